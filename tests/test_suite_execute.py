"""Suites that are cut off, fail and go on; the real worker once, a stand-in for what goes wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from warm_commands import WarmCommand

from moe_emergence import suite
from moe_emergence.analysis.routing_record import read_routing, record_routing, save_routing
from moe_emergence.errors import RunError, exit_code
from moe_emergence.experiments import execute as executing
from moe_emergence.experiments.execute import Execution, RunState, execute, is_complete
from moe_emergence.experiments.live import read_progress
from moe_emergence.experiments.plan import PlannedRun, plan_runs
from moe_emergence.experiments.suite_file import load_suite
from moe_emergence.interrupt import Interrupted
from moe_emergence.models import MoEGPT2Config, MoEGPT2LMHeadModel
from moe_emergence.run_folder import RunFolder, write_json
from moe_emergence.settings import to_dict

pytestmark = pytest.mark.slow

TINY = Path(__file__).parent / "tiny_suite.toml"

STAND_IN = """
import json, pathlib, signal, sys, time
plan = json.loads(pathlib.Path(sys.argv[1]).read_text())
run = pathlib.Path(plan["output_dir"], plan["run_name"])
name = run.parent.name
(run / "final-model").mkdir(parents=True, exist_ok=True)
(run / "config.json").write_text(json.dumps(plan))
with open(run.parents[1] / "calls.txt", "a") as calls:
    calls.write(f"{name} ")
if name in pathlib.Path(__file__).with_suffix(".fail").read_text().split():
    sys.exit("Killed for want of memory")
if name in pathlib.Path(__file__).with_suffix(".deaf").read_text().split():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
if name in pathlib.Path(__file__).with_suffix(".hang").read_text().split():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    time.sleep(60)
(run / "routing.npz").write_text("")
if "--test-modules" in sys.argv:
    (run / "modules.csv").write_text("")
(run / "run_summary.json").write_text(json.dumps({"status": "completed"}))
"""


class StandIn:
    """A worker that writes the files of a run, or fails or hangs for the variants it is told."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "suite"
        self.root.mkdir()
        self.script = folder / "worker.py"
        self.script.write_text(STAND_IN)
        self.tell()

    def tell(self, *, fail: str = "", hang: str = "", deaf: str = "") -> None:
        self.script.with_suffix(".fail").write_text(fail)
        self.script.with_suffix(".hang").write_text(hang)
        self.script.with_suffix(".deaf").write_text(deaf)

    def runs(self) -> list[PlannedRun]:
        return plan_runs(load_suite(str(TINY)), self.root)

    def execute(self, jobs: int = 1, *, keep_models: bool = False) -> list[RunState]:
        command = (sys.executable, str(self.script))
        execution = Execution(self.root, jobs, keep_models=keep_models, command=command)
        return execute(self.runs(), execution)[0]

    def calls(self) -> list[str]:
        """The variants that ran since the last look, in order."""
        path = self.root / "calls.txt"
        found = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return found


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.setattr(executing, "_POLL_SECONDS", 0.02)
    return StandIn(tmp_path)


def by_name(states: Sequence[RunState]) -> dict[str, str]:
    return {state.planned.variant: state.state for state in states}


@pytest.mark.parametrize("jobs", [1, 3])
def test_what_is_complete_is_skipped(stand_in: StandIn, jobs: int) -> None:
    states = stand_in.execute(jobs)
    assert set(by_name(states).values()) == {"complete"}
    calls = stand_in.calls()
    assert calls[0] == "base"
    assert sorted(calls) == ["base", "dense", "dense-flops", "frozen", "moe"]
    assert set(by_name(stand_in.execute(jobs)).values()) == {"complete"}
    assert stand_in.calls() == []


def test_a_run_from_before_a_setting_existed_stays_complete(stand_in: StandIn) -> None:
    stand_in.execute()
    for path in stand_in.root.glob("*/*/config.json"):
        saved = json.loads(path.read_text())
        del saved["optim"]["variance_coef"]
        path.write_text(json.dumps(saved))
    stand_in.calls()
    assert set(by_name(stand_in.execute()).values()) == {"complete"}
    assert stand_in.calls() == []


def test_a_folder_keeps_its_seeds_and_is_left_alone_when_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_emergence.suite.work.execute", lambda runs, execution: ([], 0))
    path = tmp_path / "suite.json"
    for seed in ("3", "4", "3"):
        suite.main(["run", str(TINY), "--out", str(tmp_path), "--seeds", seed])
    assert json.loads(path.read_text())["seeds"] == [3, 4]
    before = path.read_text()
    other = to_dict(next(r for r in plan_runs(load_suite(str(TINY)), tmp_path)).config)
    other["optim"]["learning_rate"] = 0.5
    write_json(RunFolder(tmp_path / "base" / "seed-0").config, other)
    with pytest.raises(ValueError, match="seed-0"):
        suite.main(["run", str(TINY), "--out", str(tmp_path), "--seeds", "0"])
    assert path.read_text() == before


@pytest.mark.parametrize("keep_models", [False, True])
def test_what_a_killed_suite_left_of_a_complete_run_is_tidied(
    stand_in: StandIn, keep_models: bool
) -> None:
    """Killed after a run was complete and before its models were deleted: the plan is there."""
    stand_in.execute(keep_models=keep_models)
    assert list((stand_in.root / "plans").iterdir()) == []
    runs = {run.variant: run for run in stand_in.runs()}
    for run in runs.values():
        run.run.checkpoint(1).mkdir(parents=True)
        run.run.final_model.mkdir(exist_ok=True)
    for variant in ("base", "moe"):
        write_json(stand_in.root / "plans" / f"{variant}-seed-0.json", {})
    stand_in.calls()
    stand_in.execute(keep_models=keep_models)
    assert stand_in.calls() == []
    assert list((stand_in.root / "plans").iterdir()) == []
    # of runs that are done with nothing is deleted: they may have been asked for
    kept = {v for v, run in runs.items() if run.run.checkpoints.exists()}
    assert kept == (set(runs) if keep_models else set(runs) - {"base", "moe"})
    models = {v for v, run in runs.items() if run.run.final_model.exists()}
    assert models == (set(runs) if keep_models else set(runs) - {"moe"})


def test_one_failure_does_not_lose_the_rest(stand_in: StandIn) -> None:
    stand_in.tell(fail="moe")
    states = stand_in.execute()
    assert by_name(states) == {
        "base": "complete", "dense": "complete", "moe": "failed", "frozen": "complete",
        "dense-flops": "complete",
    }  # fmt: skip
    assert states[2].note == "Killed for want of memory"
    stand_in.calls()
    stand_in.tell()
    assert by_name(stand_in.execute())["moe"] == "complete"
    assert stand_in.calls() == ["moe"]


def test_without_its_base_no_variant_begins(stand_in: StandIn) -> None:
    stand_in.tell(fail="base")
    states = stand_in.execute()
    assert set(by_name(states).values()) == {"failed"}
    assert stand_in.calls() == ["base"]
    assert states[1].note == "its base failed"


def test_a_signal_stops_the_runs_and_the_next_call_goes_on(stand_in: StandIn) -> None:
    stand_in.tell(hang="moe")

    def interrupt() -> None:
        while "moe" not in (stand_in.root / "calls.txt").read_text():
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    (stand_in.root / "calls.txt").write_text("")
    watcher = threading.Thread(target=interrupt)
    watcher.start()
    started = time.monotonic()
    states = stand_in.execute()
    watcher.join()
    assert time.monotonic() - started < 30
    assert by_name(states) == {
        "base": "complete", "dense": "complete", "moe": "stopped", "frozen": "waiting",
        "dense-flops": "waiting",
    }  # fmt: skip
    stand_in.calls()
    stand_in.tell()
    assert set(by_name(stand_in.execute()).values()) == {"complete"}
    assert stand_in.calls() == ["moe", "frozen", "dense-flops"]


def test_a_signal_that_insists_kills_a_run_that_does_not_end(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.tell(deaf="base")
    monkeypatch.setattr("moe_emergence.interrupt._AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(executing, "_PATIENCE_SECONDS", 0.5)
    begun: list[subprocess.Popen[bytes]] = []
    spawn = executing._spawn

    def spawn_and_interrupt(command: Sequence[str], log: IO[bytes]) -> "subprocess.Popen[bytes]":
        begun.append(spawn(command, log))
        while not (stand_in.root / "calls.txt").exists():
            time.sleep(0.05)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
        return begun[0]

    monkeypatch.setattr(executing, "_spawn", spawn_and_interrupt)
    with pytest.raises(Interrupted) as stopped:
        stand_in.execute()
    assert stopped.value.number == signal.SIGUSR1
    assert begun[0].poll() == -signal.SIGKILL


def test_a_folder_with_another_run_is_refused_before_anything_begins(stand_in: StandIn) -> None:
    stand_in.execute()
    stand_in.calls()
    config = stand_in.root / "frozen" / "seed-0" / "config.json"
    values = json.loads(config.read_text())
    values["optim"]["lb_coef"] = 0.5
    config.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"frozen.*--lb-coef 0\.01: .* with 0\.5.*another --out"):
        stand_in.execute()
    assert stand_in.calls() == []


def test_progress_is_read_from_the_end_of_the_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_progress(path).step == 0
    rows = [{"step": s, "train/lm_loss": 9.0 - s / 1000} for s in range(1, 1001)]
    rows[989]["perf/tokens_per_sec"] = 123.0
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text + '{"step": 1001, "train/lm')
    now = read_progress(path)
    assert (now.step, now.lm_loss, now.tokens_per_s) == (1000, 8.0, 123.0)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_record_holds_the_model_s_own_decisions(top_k: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MoEGPT2LMHeadModel(
        MoEGPT2Config(
            vocab_size=50, n_positions=8, n_layer=3, n_embd=16, n_head=2, moe_layers=[0, 2],
            num_experts=4, num_experts_per_tok=top_k, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    blocks = {
        d: torch.randint(50, (rows, 8)) for d, rows in (("code", 3), ("math", 9), ("prose", 5))
    }
    record = record_routing(model, blocks, max_blocks=6, batch_size=4)
    assert model.training
    assert record.domains.tolist() == [0] * 3 + [1] * 6 + [2] * 5
    assert record.layers.tolist() == [0, 2]
    model.eval()
    for place, domain in enumerate(blocks):
        here = record.domains == place
        ids = blocks[domain][:6]
        assert np.array_equal(record.token_ids[here], ids.numpy())
        for n, decision in enumerate(model(input_ids=ids).router_decisions):
            experts = decision.topk_experts.reshape(*ids.shape, top_k)
            assert np.array_equal(record.experts[n][here], experts.numpy())
            probs = decision.router_probs.gather(1, decision.topk_experts).detach()
            np.testing.assert_allclose(
                record.probs_top[n][here].ravel(), probs.ravel(), rtol=1e-3, atol=1e-4
            )
    path = tmp_path / "routing.npz"
    save_routing(record, path)
    again = read_routing(path)
    for name, array in vars(record).items():
        assert np.array_equal(getattr(again, name), array)
    with pytest.raises(RunError, match="cannot write"):
        save_routing(record, path / "routing.npz")  # below a file
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"routing\.npz: no routing can be read"):
        read_routing(path)


def warm_worker(command: Sequence[str], log: IO[bytes]) -> WarmCommand:
    """The worker's own command, in a process that has its imports."""
    program, *arguments = command
    assert program == sys.executable
    path = Path(log.name).resolve()
    return WarmCommand(arguments, Path.cwd(), path, path)


def test_the_command_runs_a_suite_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(executing, "_spawn", warm_worker)
    flags = ["--out", "suite", "--jobs", "2", "--only", "dense", "moe"]
    assert exit_code(suite.main, ["run", str(TINY), *flags]) == 0
    runs = [
        run
        for run in plan_runs(load_suite(str(TINY)), tmp_path / "suite")
        if run.variant in ("base", "dense", "moe")
    ]
    assert all(is_complete(run) for run in runs)
    moe = tmp_path / "suite" / "moe" / "seed-0"
    assert [run.variant for run in runs if run.run.final_model.exists()] == ["base"]
    record = read_routing(moe / "routing.npz")
    # the routing recorded afterwards is the one that the run's last evaluation counted
    table = (moe / "expert_domain.csv").read_text().splitlines()
    assert record.experts.shape == (1, 12, 32, 1)
    for line in table[1:]:
        values = dict(zip(table[0].split(","), line.split(","), strict=True))
        place = ("code", "math", "prose").index(values["domain"])
        chosen = record.experts[0][record.domains == place]
        assert float(values["fraction"]) == pytest.approx(
            np.mean(chosen == int(values["expert"])), abs=1e-6
        )
    out = str(tmp_path / "suite")
    assert exit_code(suite.main, ["report", str(TINY), "--out", out]) == 0
    table = (tmp_path / "suite" / "tables" / "specialisation.csv").read_text().splitlines()
    assert table[1].startswith("moe,0,learned,8,1")
    report = (tmp_path / "suite" / "report.md").read_text()
    modules = report[report.index("## Modules") : report.index("## Collapse")]
    lines = [line for line in modules.splitlines() if line.startswith("| moe |")]
    assert [line.split(" | ")[1] for line in lines] == ["code", "math", "prose"]
    assert all(re.match(r"\| moe \| \w+ \| [01] of 1 ", line) for line in lines)
    assert "| moe |" in report[report.index("## Churn") : report.index("## Modules")]
    capsys.readouterr()
    assert exit_code(suite.main, ["run", str(TINY), "--out", out, "--budget", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1

"""`python -m moe_emergence.train` and `generate` as a person uses them."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors import safe_open
from warm_commands import WarmCommand, run_warm

from moe_emergence import generate, train
from moe_emergence.analysis.summary import what_was_shown
from moe_emergence.config import SHIPPED
from moe_emergence.domain_fractions import DomainFractions, read_domain_fractions
from moe_emergence.errors import exit_code
from moe_emergence.run_folder import RunFolder, read_json, read_metrics
from moe_emergence.train import work
from moe_emergence.training.next_commands import commands_to_look, resume_command

pytestmark = pytest.mark.slow

Command = Callable[..., "subprocess.CompletedProcess[str]"]
TRAIN = ("-m", "moe_emergence.train")


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, data_folder: Path, cache_folder: Path
) -> tuple[RunFolder, "subprocess.CompletedProcess[str]"]:
    """The demo preset at toy size, run once for the tests that look at what it left behind."""
    where = tmp_path_factory.mktemp("finished")
    done = run_warm(
        *(*TRAIN, "--dispatch", "fused", "--device", "cpu"),
        *("--data", str(data_folder), "--cache-dir", str(cache_folder)),
        *("--n-embd", "16", "--n-head", "2", "--block-size", "16", "--vocab-size", "300"),
        *("--batch-size", "4", "--max-steps", "4", "--pretrain-steps", "2"),
        *("--eval-every", "2", "--save-every", "2", "--log-router-every", "2"),
        where=where,
        logs=tmp_path_factory.mktemp("logs"),
    )
    return RunFolder(where / "runs" / "demo"), done


def _bits(fractions: DomainFractions) -> str:
    """H(expert) - H(expert | domain) of every layer, domains of equal weight."""

    def entropy(shares: Sequence[float]) -> float:
        return -sum(p * math.log2(p) for p in shares if p > 0)

    found = []
    for by_domain in fractions.values():
        rows = list(by_domain.values())
        together = [sum(shares) / len(rows) for shares in zip(*rows, strict=True)]
        found.append(entropy(together) - sum(map(entropy, rows)) / len(rows))
    return ", ".join(f"{one:.2f}" for one in found)


def test_demo_ends_well_and_says_so(
    finished: tuple[RunFolder, "subprocess.CompletedProcess[str]"],
) -> None:
    run, done = finished
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "mixture - dense" in done.stdout
    assert "mixture - random" in done.stdout
    analyze, generate = done.stdout.split("next:\n")[1].splitlines()
    assert analyze.split("#")[0].split() == ["python", "-m", "moe_emergence.analyze", "runs/demo"]
    words = shlex.split(generate)
    assert words[:3] == ["python", "-m", "moe_emergence.generate"]
    assert run.root / "best-model" == run.root.parents[1] / words[words.index("--checkpoint") + 1]
    assert "--show-routing" in words
    null = RunFolder(run.root / "null")
    bits = [_bits(read_domain_fractions(of.expert_domain)) for of in (run, null)]
    shown = "tells {} of 1.58 bits of a token's domain (layer by layer); a random router's {}."
    assert shown.format(*bits) in " ".join(done.stdout.split())
    losses = [read_metrics(of.metrics)[-1]["eval/lm_loss"] for of in (run, null)]
    gap = losses[0] - losses[1]
    worth = f"worth {-gap:.4f} nats" if gap < 0 else f"worth nothing over random ({gap:+.4f} nats)"
    assert worth in " ".join(done.stdout.split())
    summary = read_json(run.summary)
    assert summary["status"] == "completed"
    assert summary["final_step"] == 4
    assert summary["tokens_per_sec"] > 0
    assert summary["wall_seconds"] > 0


@pytest.mark.parametrize(
    ("losses", "steps", "expected"),
    [
        ((3.0, 3.25), (4, 4), "worth 0.2500 nats over random. "),
        ((3.25, 3.0), (4, 4), "worth nothing over random (+0.2500 nats). "),
        ((3.0, 3.0), (4, 4), "worth nothing over random (+0.0000 nats). "),
        ((3.0, 3.25), (4, 2), "router's 0.92. That is one seed"),
    ],
)
def test_the_last_sentence_says_what_routing_gained(
    losses: tuple[float, float], steps: tuple[int, int], expected: str, tmp_path: Path
) -> None:
    runs = {}
    for role, loss, step in zip(("moe", "null"), losses, steps, strict=True):
        run = runs[role] = RunFolder(tmp_path / role)
        run.root.mkdir()
        run.metrics.write_text(json.dumps({"step": step, "eval/lm_loss": loss}) + "\n")
        rows = [f"1,{d},{e},{float(e == (d == 'code'))}" for d in SHIPPED for e in (0, 1)]
        run.expert_domain.write_text("\n".join(["layer,domain,expert,fraction", *rows]) + "\n")
    assert expected in what_was_shown(runs)


def test_run_folder_holds_what_the_contract_names(
    finished: tuple[RunFolder, "subprocess.CompletedProcess[str]"],
) -> None:
    run, _ = finished
    for path in (run.config, run.environment, run.data_manifest, run.metrics, run.summary):
        assert path.is_file(), path
    for folder in (run.best_model, run.final_model, run.checkpoint(4)):
        assert (folder / "model.safetensors").is_file(), folder
        assert (folder / "tokenizer.json").is_file(), folder
    assert (run.root / "expert_domain.png").stat().st_size > 10_000
    assert (run.root / "expert_domain.csv").read_text().startswith("layer,domain,expert,fraction")
    assert (run.root / "dense" / "run_summary.json").is_file()
    null = RunFolder(run.root / "null")
    assert read_json(null.summary)["final_step"] == 4
    assert read_json(null.config)["model"]["router_init"] == "random"
    assert read_json(run.config)["model"]["router_init"] == "clusters"
    assert (run.root / "dense-base" / "run_summary.json").is_file()
    environment = read_json(run.environment)
    assert {"python", "packages", "device", "commit", "precision"} <= environment.keys()
    assert environment["command"][:2] == ["train.py", "--dispatch"]


def test_metrics_have_the_documented_keys_at_the_documented_steps(
    finished: tuple[RunFolder, "subprocess.CompletedProcess[str]"],
) -> None:
    run, _ = finished
    rows = read_metrics(run.metrics)
    train = [row for row in rows if "train/lm_loss" in row]
    assert [row["step"] for row in train] == [1, 2, 3, 4]
    for row in train:
        assert {
            "train/lm_loss",
            "train/lb_loss",
            "train/z_loss",
            "train/learning_rate",
        } <= row.keys()
        assert any(f"train/lm_loss_{domain}" in row for domain in SHIPPED)
    routed = {row["step"]: row for row in rows if "router/layer_2_entropy" in row}
    assert sorted(routed) == [2, 4]
    for layer in (2, 3):
        shares = [routed[4][f"router/layer_{layer}_expert_{e}_frac"] for e in range(8)]
        assert sum(shares) == pytest.approx(1)
    evaluated = [row for row in rows if "eval/lm_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 2, 4]
    best = min(row["eval/lm_loss"] for row in evaluated)
    assert read_json(run.summary)["best_eval_lm_loss"] == best
    assert any("perf/tokens_per_sec" in row for row in rows)


def test_table_on_screen_is_what_was_measured(
    finished: tuple[RunFolder, "subprocess.CompletedProcess[str]"],
) -> None:
    run, done = finished
    last = read_metrics(run.metrics)[-1]
    dense = read_metrics(run.root / "dense" / "metrics.jsonl")[-1]
    keys = {domain: f"eval/lm_loss_{domain}" for domain in SHIPPED} | {"all": "eval/lm_loss"}
    for name, key in keys.items():
        row = next(line for line in done.stdout.splitlines() if f"│ {name} " in line)
        shown = [float(number) for number in re.findall(r"[-+]?\d\.\d{4}", row)]
        assert shown[1:3] == [round(last[key], 4), round(dense[key], 4)]
        assert shown[4] == round(last[key] - dense[key], 4)


def test_mixture_starts_from_its_dense_base(
    finished: tuple[RunFolder, "subprocess.CompletedProcess[str]"],
) -> None:
    """Warm start: at step 0 the mixture's losses are the base's last ones, up to copy noise."""
    run, _ = finished
    base = read_metrics(run.root / "dense-base" / "metrics.jsonl")[-1]
    start = read_metrics(run.metrics)[0]
    assert start["step"] == 0
    assert start["eval/lm_loss"] == pytest.approx(base["eval/lm_loss"], abs=1e-3)
    dense = read_metrics(run.root / "dense" / "metrics.jsonl")[0]
    assert dense["eval/lm_loss"] == pytest.approx(base["eval/lm_loss"], abs=1e-6)


def test_generate_from_every_kind_of_model(
    finished: tuple[RunFolder, "subprocess.CompletedProcess[str]"],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _ = finished

    def generated(folder: Path, *flags: str) -> str:
        prompt = ["--prompt", "code1", "--max-new-tokens", "4"]
        assert generate.main([*prompt, "--checkpoint", str(folder), *flags]) == 0
        return capsys.readouterr().out

    trained = generated(run.best_model, "--show-routing")
    assert "layer 2" in trained
    assert "layer 3" in trained
    assert generated(run.checkpoint(4), "--temperature", "0").startswith("code1")
    dense = run.root / "dense" / "final-model"
    assert generated(dense).startswith("code1")
    upcycled = ("--upcycle-layers", "1", "--show-routing", "--num-experts", "3")
    assert "layer 1" in generated(dense, *upcycled)
    with pytest.raises(ValueError, match=r"^--show-routing"):
        generated(dense, "--show-routing")


def test_ctrl_c_saves_a_checkpoint_and_resume_goes_on(
    tiny_flags: list[str], tmp_path: Path
) -> None:
    endless = [*tiny_flags, "--max-steps", "100000", "--eval-every", "100000", "--run-name", "c"]
    errors = tmp_path / "errors.txt"
    printed = tmp_path / "printed.txt"
    process = WarmCommand([*TRAIN, *endless], tmp_path, printed, errors)
    run = RunFolder(tmp_path / "runs" / "c")
    deadline = time.monotonic() + 120
    while not run.checkpoint_steps() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 130, errors.read_text("utf-8")
    summary = read_json(run.summary)
    assert summary["status"] == "interrupted"
    assert run.checkpoint_steps()[-1] == summary["final_step"] > 0
    assert read_metrics(run.metrics)[-1]["step"] == summary["final_step"]
    program, *more = shlex.split(printed.read_text("utf-8").split("to go on:\n")[1])
    assert (program, *more[:2]) == ("python", *TRAIN)
    more += ["--stop-after", str(summary["final_step"] + 1)]
    assert exit_code(train.main, more[2:]) == 0
    assert read_json(run.summary)["final_step"] == summary["final_step"] + 1


def test_an_end_at_once_says_how_to_go_on(
    tiny_flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def interrupted(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "run_experiment", interrupted)
    assert exit_code(train.main, tiny_flags) == 130
    said = caplog.text.partition("to go on: python -m moe_emergence.train ")[2].split("\n")[0]
    left = shlex.join(tiny_flags).replace(" --resume none", "").replace(" --stop-after none", "")
    assert said == f"{left} --resume auto"
    assert capsys.readouterr().err == "error: interrupted\n"


def test_going_on_takes_the_flags_but_not_where_to_begin_and_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = [
        "--stop-after",
        "3",
        "--run-name",
        "a b",
        "--resume=auto",
        "--resume",
        "old",
        "--debug",
    ]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    expected = "-m moe_emergence.train --run-name 'a b' --debug --resume auto"
    assert resume_command(flags) == f"python {expected}"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resume_command(flags) == f"(your launcher) {expected}"


def test_a_dense_run_is_not_to_be_analysed(tmp_path: Path) -> None:
    (command,) = commands_to_look(RunFolder(tmp_path / "my run"), is_mixture=False)
    words = shlex.split(command)
    assert words[2] == "moe_emergence.generate"
    assert str(tmp_path / "my run" / "best-model") in words
    assert "--show-routing" not in words


def test_a_full_disk_ends_the_run_and_keeps_the_older_checkpoint(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A limit on file size stands for the full disk: it lets the base through, not the mixture."""
    resource = pytest.importorskip("resource", reason="file size limits are a POSIX feature")
    assert exit_code(train.main, [*tiny_flags, "--stop-after", "3"]) == 0
    run = RunFolder(tmp_path / "runs" / "tiny")
    weights = (run.checkpoint(3) / "model.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (weights // 2, before[1]))
    try:
        assert exit_code(train.main, [*tiny_flags, "--resume", "auto"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: cannot write")
    assert "--output-dir" in line
    assert run.checkpoint_steps() == [3]
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-000003"]
    with safe_open(run.best_model / "model.safetensors", "pt") as file:
        assert list(file.keys())
    assert exit_code(train.main, [*tiny_flags, "--resume", "auto"]) == 0


def test_nan_loss_stops_with_advice_and_keeps_the_checkpoint(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = [
        *tiny_flags,
        "--learning-rate",
        "1e30",
        "--warmup-fraction",
        "0",
        "--max-grad-norm",
        "1e30",
    ]
    flags += ["--save-every", "1", "--log-every", "1"]
    assert exit_code(train.main, flags) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: (train|eval)/\S+ is (nan|inf|not finite)", line), line
    assert "--learning-rate" in line
    run = RunFolder(tmp_path / "runs" / "tiny")
    assert read_json(run.summary)["status"] == "failed"
    assert all("NaN" not in text for text in run.metrics.read_text().splitlines())


BAD_FLAGS: dict[str, tuple[list[str], str]] = {
    "unknown flag": (["--bogus", "1"], "--bogus"),
    "unknown preset": (["--preset", "huge"], "--preset huge"),
    "unknown dispatcher": (["--dispatch", "magic"], "'magic' for argument '--dispatch'"),
    "not a number": (["--max-steps", "many"], "--max-steps"),
    "value missing": (["--max-steps"], "'--max-steps'"),
    "top_k above num_experts": (["--top-k", "9"], "--top-k 9"),
    "layer outside the model": (["--moe-layers", "2"], "--moe-layers [2]"),
    "layer named twice": (["--moe-layers", "1", "1"], "--moe-layers [1, 1]"),
    "no steps": (["--max-steps", "0"], "--max-steps 0"),
    "negative coefficient": (["--lb-coef", "-1"], "--lb-coef -1.0"),
    "run name with a path": (["--run-name", "a/b"], "--run-name 'a/b'"),
    "no GPU": (["--device", "cuda"], "--device cuda"),
    "no data": (["--data", "no-such-folder"], "no-such-folder"),
    "wrong field": (["--text-field", "body"], "--text-field"),
    "megablocks missing": (["--dispatch", "megablocks"], "pip install"),
    "no base": (["--base", "no-such-model", "--moe-layers", "1"], "--base no-such-model"),
    "resume from nowhere": (["--resume", "nowhere"], "--resume nowhere"),
    "no pretraining": (["--pretrain-steps", "0"], "--pretrain-steps 0"),
    "bad revision": (["--hub-revision", "poetry=main"], "--hub-revision poetry=main"),
}


@pytest.mark.parametrize(("flags", "names"), BAD_FLAGS.values(), ids=BAD_FLAGS.keys())
def test_bad_flags_are_one_line_and_exit_code_2(
    flags: list[str],
    names: str,
    tiny_flags: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from moe_emergence.entry import run
    from moe_emergence.train import main

    if flags == ["--device", "cuda"]:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert run(main, [*tiny_flags, *flags]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, captured.err
    assert names in lines[0], lines[0]
    assert "Traceback" not in captured.err
    assert not (tmp_path / "runs" / "tiny" / "config.json").exists()


@pytest.mark.parametrize("debug", ["--debug", "--debug yes", "--debug=yes", "--debug no --debug"])
def test_debug_shows_the_traceback(debug: str) -> None:
    with pytest.raises(ValueError, match="--top-k 99"):
        exit_code(train.main, [*debug.split(), "--top-k", "99"])


@pytest.mark.parametrize("debug", ["--no-debug", "--debug no", "--debug=no", "--debug --no-debug"])
def test_without_debug_there_is_none(debug: str) -> None:
    assert exit_code(train.main, [*debug.split(), "--top-k", "99"]) == 2


def test_help_groups_and_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        train.main(["--help"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    for group in ("model options", "data options", "optim options", "monitor options"):
        assert group in printed
    for flag in ("--run-name", "--stop-after", "--lb-coef", "--moe-layers", "--size-mb", "--track"):
        assert flag in printed


def test_presets_take_every_flag(tmp_path: Path, tiny_flags: list[str]) -> None:
    flags = [f for f in tiny_flags if f not in ("--preset", "demo")]
    assert (
        exit_code(train.main, ["--preset", "top2", *flags, "--run-name", "t", "--top-k", "2"]) == 0
    )
    config = read_json(tmp_path / "runs" / "t" / "config.json")
    assert config["preset"] == "top2"
    assert config["optim"]["max_steps"] == 6


def test_console_script_lists_its_verbs(command: Command) -> None:
    script = "import sys; from moe_emergence.cli import main; sys.exit(main())"
    assert "train" in command("-c", script, "--help").stdout
    refused = command("-c", script, "dance")
    assert refused.returncode == 2
    assert json.dumps(refused.stderr).count("\\n") == 1

"""Stopping and resuming is the same as never stopping: weights, optimizer and metrics, bitwise."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny
from equal_runs import assert_same_run, comparable
from safetensors.torch import load_file

from moe_emergence.config import RunConfig
from moe_emergence.run_folder import RunFolder, read_json, read_metrics
from moe_emergence.training import checkpoint
from moe_emergence.training.experiment import run_experiment

pytestmark = pytest.mark.slow

Change = Callable[[RunConfig], RunConfig]

VARIANTS: dict[str, Change] = {
    # noise is still being annealed when the run stops
    "noise": lambda c: replace(c, optim=replace(c.optim, noise_std=0.5, noise_anneal_fraction=1.0)),
    "dropout": lambda c: replace(c, model=replace(c.model, dropout=0.2)),
    "top-2 accumulation": lambda c: replace(
        c,
        model=replace(c.model, top_k=2),
        optim=replace(c.optim, batch_size=2, grad_accum_steps=2),
    ),
    "micro balance": lambda c: replace(
        c, optim=replace(c.optim, balance_scope="micro", batch_size=2, grad_accum_steps=2)
    ),
    "expert bias": lambda c: replace(c, model=replace(c.model, expert_bias_rate=0.01)),
    "frozen router": lambda c: replace(c, model=replace(c.model, router="frozen")),
    "hash router": lambda c: replace(c, model=replace(c.model, router="hash")),
}


@pytest.fixture(scope="module")
def made_once(
    tmp_path_factory: pytest.TempPathFactory, data_folder: Path, cache_folder: Path
) -> dict[str, Path]:
    """The folders of a whole run and of one stopped after step 3."""
    torch.set_num_threads(1)  # as in every test, before the first of which this may run
    folders = {}
    for name, stop_after in (("whole", None), ("stopped", 3)):
        config = tiny(data_folder, cache_folder, tmp_path_factory.mktemp(name))
        run_experiment(replace(config, stop_after=stop_after))
        folders[name] = Path(config.output_dir) / "tiny"
    return folders


@pytest.fixture
def whole(made_once: dict[str, Path], tiny_config: RunConfig) -> RunFolder:
    """A finished run of `tiny_config`, where that would have put it."""
    run = RunFolder(Path(tiny_config.output_dir) / "tiny")
    shutil.copytree(made_once["whole"], run.root)
    return run


@pytest.fixture
def stopped(made_once: dict[str, Path], tiny_config: RunConfig) -> tuple[RunConfig, RunFolder]:
    """A run stopped after step 3, and the configuration that would resume it."""
    run = RunFolder(Path(tiny_config.output_dir) / "tiny")
    shutil.copytree(made_once["stopped"], run.root)
    return replace(tiny_config, resume="auto"), run


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_resumed_run_equals_uninterrupted_run_bitwise(
    tiny_config: RunConfig, tmp_path: Path, variant: Change
) -> None:
    config = variant(tiny_config)
    assert run_experiment(config).status == "completed"
    stopped = replace(config, output_dir=str(tmp_path / "stopped"), stop_after=2)
    assert run_experiment(stopped).status == "interrupted"
    run = RunFolder(Path(stopped.output_dir) / "tiny")
    assert read_json(run.summary)["status"] == "interrupted"
    assert read_json(run.summary)["final_step"] == 2
    # stopping twice, the second time off every interval
    again = replace(stopped, resume="auto", stop_after=5)
    assert run_experiment(again).status == "interrupted"
    assert run_experiment(replace(again, stop_after=None)).status == "completed"
    assert_same_run(RunFolder(Path(config.output_dir) / "tiny"), run)


def test_a_resumed_run_remembers_its_best_model(tiny_config: RunConfig, tmp_path: Path) -> None:
    """A learning rate that makes every evaluation worse than the first."""
    optim = replace(tiny_config.optim, learning_rate=5.0, warmup_fraction=0.0)
    config = replace(tiny_config, optim=optim)
    run_experiment(config)
    whole = RunFolder(Path(config.output_dir) / "tiny")
    losses = [row["eval/lm_loss"] for row in read_metrics(whole.metrics) if "eval/lm_loss" in row]
    assert min(losses) == losses[0]
    stopped = replace(config, output_dir=str(tmp_path / "stopped"))
    run_experiment(replace(stopped, stop_after=2))
    run_experiment(replace(stopped, resume="auto"))
    run = RunFolder(tmp_path / "stopped" / "tiny")
    assert_same_run(whole, run)
    assert read_json(run.summary)["best_eval_lm_loss"] == losses[0]


def test_crash_between_checkpoints_is_made_good(
    tiny_config: RunConfig, whole: RunFolder, tmp_path: Path
) -> None:
    """Rows written after the newest checkpoint are dropped and measured again."""
    crashed = RunFolder(tmp_path / "crashed" / "tiny")
    shutil.copytree(whole.root, crashed.root)
    shutil.rmtree(crashed.checkpoint(6))
    shutil.rmtree(crashed.final_model)
    crashed.summary.unlink()
    with crashed.metrics.open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "train/lm_lo')
    run_experiment(replace(tiny_config, output_dir=str(tmp_path / "crashed"), resume="auto"))
    assert_same_run(whole, crashed)


def test_crash_before_the_first_checkpoint_starts_over(
    tiny_config: RunConfig, whole: RunFolder, tmp_path: Path
) -> None:
    crashed = RunFolder(tmp_path / "crashed" / "tiny")
    shutil.copytree(whole.root, crashed.root)
    shutil.rmtree(crashed.checkpoints)
    crashed.summary.unlink()
    run_experiment(replace(tiny_config, output_dir=str(tmp_path / "crashed"), resume="auto"))
    assert_same_run(whole, crashed)


def test_killed_while_saving_leaves_nothing_behind(stopped: tuple[RunConfig, RunFolder]) -> None:
    """kill -9 between the two renames of a swap, and in the middle of writing a folder."""
    config, run = stopped
    run.best_model.rename(run.root / ".best-model.123.old")
    shutil.copytree(run.checkpoint(3), run.checkpoints / ".step-000006.123.tmp")
    run_experiment(config)
    hidden = [p.name for p in (*run.root.iterdir(), *run.checkpoints.iterdir())]
    assert not [name for name in hidden if name.startswith(".")]
    assert (run.best_model / "model.safetensors").is_file()


def test_auto_falls_back_to_the_newest_whole_checkpoint(
    tiny_config: RunConfig, whole: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = RunFolder(tmp_path / "damaged" / "tiny")
    shutil.copytree(whole.root, damaged.root)
    damaged.summary.unlink()
    _truncate(damaged.checkpoint(6) / "trainer.pt")
    config = replace(tiny_config, output_dir=str(tmp_path / "damaged"), resume="auto")
    with caplog.at_level("WARNING", "moe_emergence"):
        run_experiment(config)
    assert any("torn, trainer.pt" in record.message for record in caplog.records)
    assert_same_run(whole, damaged)


@pytest.mark.parametrize("stage", ["tiny base", "tiny"])
def test_a_signal_in_the_last_step_of_a_stage_ends_the_experiment(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    config = replace(tiny_config, optim=replace(tiny_config.optim, compare_dense=True))
    last = {"tiny base": 4, "tiny": 6}[stage]
    monkeypatch.setattr(
        "moe_emergence.training.trainer.Trainer._agreed",
        lambda self, requested: self.config.run_name == stage and self.step == last,
    )
    result = run_experiment(config)
    assert result.status == "interrupted"
    assert result.stopped_by_signal
    assert [s.config.run_name for s in result.stages][-1] == stage
    monkeypatch.undo()
    assert run_experiment(replace(config, resume="auto")).status == "completed"


def test_layers_in_any_order_are_the_same_run(tiny_config: RunConfig) -> None:
    def run_with(name: str, layers: tuple[int, ...]) -> RunFolder:
        model = replace(tiny_config.model, moe_layers=layers)
        run_experiment(replace(tiny_config, run_name=name, model=model))
        return RunFolder(Path(tiny_config.output_dir) / name)

    one, other = run_with("one", (0, 1)), run_with("other", (1, 0))
    assert comparable(one.metrics) == comparable(other.metrics)
    assert one.expert_domain.read_text() == other.expert_domain.read_text()


def test_a_moved_checkpoint_still_knows_its_data(
    tiny_config: RunConfig, stopped: tuple[RunConfig, RunFolder], tmp_path: Path
) -> None:
    _, run = stopped
    shutil.copytree(run.checkpoint(3), tmp_path / "moved")
    other_data = replace(tiny_config.data, size_mb=0.005)
    config = replace(tiny_config, run_name="b", resume=str(tmp_path / "moved"), data=other_data)
    with pytest.raises(ValueError, match="data"):
        run_experiment(config)


def test_stop_in_the_base_run_is_resumed_there(
    tiny_config: RunConfig, whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny_config, output_dir=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        patch.setattr(
            "moe_emergence.training.trainer.Trainer._agreed",
            lambda self, requested: self.config.run_name == "tiny base" and self.step == 2,
        )
        assert run_experiment(config).status == "interrupted"
    run = RunFolder(tmp_path / "stopped" / "tiny")
    summary = read_json(run.summary)
    assert (summary["status"], summary["final_step"]) == ("interrupted", 0)
    assert not run.metrics.exists()
    assert run_experiment(replace(config, resume="auto")).status == "completed"
    assert_same_run(whole, run)


def test_a_finished_run_is_not_done_again(tiny_config: RunConfig, whole: RunFolder) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.root.rglob("*.safetensors")}
    assert run_experiment(replace(tiny_config, resume="auto")).status == "completed"
    assert before == {p: p.stat().st_mtime_ns for p in whole.root.rglob("*.safetensors")}


def test_branching_off_a_checkpoint_under_another_name(
    tiny_config: RunConfig, whole: RunFolder
) -> None:
    runs = Path(tiny_config.output_dir)
    step3 = whole.checkpoint(3)
    branch = replace(tiny_config, run_name="branch", resume=str(step3))
    run_experiment(branch)
    a = load_file(runs / "tiny" / "final-model" / "model.safetensors")
    b = load_file(runs / "branch" / "final-model" / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)
    # the branch begins with an evaluation of its own: a best model of its own
    first = read_metrics(runs / "branch" / "metrics.jsonl")[0]
    assert (first["step"], "eval/lm_loss" in first) == (3, True)
    assert (runs / "branch" / "best-model" / "model.safetensors").is_file()
    assert not (runs / "branch" / "dense-base").exists()


def test_retention_keeps_the_newest_checkpoints(tiny_config: RunConfig) -> None:
    monitor = replace(tiny_config.monitor, save_every=1, keep_last_k=2)
    run_experiment(replace(tiny_config, monitor=monitor))
    run = RunFolder(Path(tiny_config.output_dir) / "tiny")
    assert run.checkpoint_steps() == [5, 6]
    assert not [p.name for p in run.checkpoints.iterdir() if p.name.startswith(".")]


def test_killed_between_a_checkpoint_and_deleting_older_ones(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last step no further checkpoint would have them deleted."""
    config = replace(tiny_config, monitor=replace(tiny_config.monitor, save_every=1, keep_last_k=2))
    run = RunFolder(Path(config.output_dir) / "tiny")
    with monkeypatch.context() as patch:
        delete = checkpoint.delete_old_checkpoints

        def killed(run: RunFolder, step: int, keep_last_k: int) -> None:
            if step == config.optim.max_steps:
                raise SystemExit
            delete(run, step, keep_last_k)

        patch.setattr(checkpoint, "delete_old_checkpoints", killed)
        with pytest.raises(SystemExit):
            run_experiment(config)
    assert run.checkpoint_steps() == [4, 5, 6]
    assert run_experiment(replace(config, resume="auto")).status == "completed"
    assert run.checkpoint_steps() == [5, 6]


def test_a_torn_checkpoint_does_not_count_among_those_to_keep(tiny_config: RunConfig) -> None:
    """Kept in their place, it would have the whole ones deleted."""
    config = replace(tiny_config, monitor=replace(tiny_config.monitor, save_every=1, keep_last_k=2))
    run = RunFolder(Path(config.output_dir) / "tiny")
    run_experiment(config)
    run.summary.unlink()
    _truncate(run.checkpoint(6) / "trainer.pt")
    run.checkpoint(6).rename(run.checkpoint(9))
    auto = replace(config, resume="auto", monitor=replace(config.monitor, keep_last_k=1))
    run_experiment(auto)
    assert run.checkpoint_steps() == [6, 9]
    assert checkpoint.load_checkpoint(run.checkpoint(6)).step == 6


REFUSED: dict[str, tuple[Change, str]] = {
    "learning rate": (
        lambda c: replace(c, optim=replace(c.optim, learning_rate=1.0)),
        "--learning-rate 1.0",
    ),
    "steps": (lambda c: replace(c, optim=replace(c.optim, max_steps=9)), "--max-steps 9"),
    "seed": (lambda c: replace(c, seed=7), "--seed 7"),
    "architecture": (
        lambda c: replace(c, model=replace(c.model, num_experts=3)),
        "--num-experts 3",
    ),
    "layers": (lambda c: replace(c, model=replace(c.model, moe_layers=(0,))), "--moe-layers"),
    "tokens per step": (
        lambda c: replace(c, optim=replace(c.optim, batch_size=3)),
        "--batch-size 3",
    ),
    "past step": (lambda c: replace(c, stop_after=3), "--stop-after 3"),
    "no checkpoint there": (lambda c: replace(c, resume="nowhere"), "--resume nowhere"),
    "not asked to resume": (lambda c: replace(c, resume=None), "--run-name tiny"),
    "other data": (
        lambda c: replace(c, data=replace(c.data, size_mb=0.005)),
        "data",
    ),
}


@pytest.mark.parametrize(("change", "names"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_not_be_the_same_run_is_refused(
    stopped: tuple[RunConfig, RunFolder], change: Change, names: str
) -> None:
    config, run = stopped
    before = sorted(p.name for p in run.checkpoints.iterdir())
    with pytest.raises(ValueError, match=names) as refusal:
        run_experiment(change(config))
    assert "\n" not in str(refusal.value)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == before


def test_the_split_of_the_batch_may_change(stopped: tuple[RunConfig, RunFolder]) -> None:
    config, _ = stopped
    split = replace(config, optim=replace(config.optim, batch_size=1, grad_accum_steps=4))
    assert run_experiment(split).status == "completed"


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


TORN: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights cut off": (lambda c: _truncate(c / "model.safetensors"), "model.safetensors"),
    "optimizer cut off": (lambda c: _truncate(c / "trainer.pt"), "trainer.pt"),
    "optimizer missing": (lambda c: (c / "trainer.pt").unlink(), "trainer.pt is missing"),
    "manifest missing": (lambda c: (c / "checkpoint.json").unlink(), "has no checkpoint.json"),
    "manifest not JSON": (lambda c: (c / "checkpoint.json").write_text("{"), "cannot be read"),
    "foreign format": (
        lambda c: (c / "checkpoint.json").write_text(json.dumps({"format": "x"})),
        "format is 'x'",
    ),
}


@pytest.mark.parametrize(("damage", "reason"), TORN.values(), ids=TORN.keys())
def test_torn_and_foreign_checkpoints_are_refused(
    stopped: tuple[RunConfig, RunFolder], damage: Callable[[Path], None], reason: str
) -> None:
    config, run = stopped
    damage(run.checkpoint(3))
    with pytest.raises(ValueError, match=reason):
        run_experiment(config)


def test_loading_a_checkpoint_never_unpickles_objects(
    stopped: tuple[RunConfig, RunFolder], tmp_path: Path
) -> None:
    config, run = stopped
    witness = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (witness,)

    torch.save({"optimizer": Evil()}, run.checkpoint(3) / "trainer.pt")
    manifest = read_json(run.checkpoint(3) / "checkpoint.json")
    content = (run.checkpoint(3) / "trainer.pt").read_bytes()
    del manifest["sha256"]
    manifest["files"]["trainer.pt"] = hashlib.sha256(content).hexdigest()
    (run.checkpoint(3) / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="something else than tensors"):
        run_experiment(config)
    assert not witness.exists()

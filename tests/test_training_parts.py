"""Collapse detector, metrics file, trackers: the parts around the loop."""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from moe_emergence.config import RunConfig
from moe_emergence.errors import RunError
from moe_emergence.run_folder import MetricsWriter, RunFolder, read_json, read_metrics, write_json
from moe_emergence.training.collapse import CollapseDetector
from moe_emergence.training.experiment import run_experiment
from moe_emergence.training.metrics import check_finite


@given(
    threshold=st.floats(0.3, 0.9),
    needed=st.integers(1, 4),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=30),
    cut=st.integers(0, 30),
)
def test_collapse_is_a_streak_above_the_threshold(
    threshold: float, needed: int, shares: list[float], cut: int
) -> None:
    """Against a direct count of the streak, with state saved and restored at any point."""
    detector, streak = CollapseDetector(threshold, needed), 0
    for step, share in enumerate(shares):
        if step == cut:
            state = json.loads(json.dumps(detector.state_dict()))
            detector = CollapseDetector(threshold, needed)
            detector.load_state_dict(state)
        streak = streak + 1 if share > threshold else 0
        found = detector.check(step, {3: [1 - share if share > 0.5 else 0.0, share]})
        hit = found is not None and found.expert == 1
        assert hit == (streak >= needed)
        if hit:
            assert found is not None
            assert (found.step, found.layer, found.fraction) == (step, 3, share)


def test_collapse_needs_the_same_expert_of_the_same_layer() -> None:
    detector = CollapseDetector(0.6, 2)
    assert detector.check(1, {0: [0.7, 0.3], 1: [0.5, 0.5]}) is None
    assert detector.check(2, {0: [0.3, 0.7], 1: [0.5, 0.5]}) is None
    assert detector.check(3, {0: [0.5, 0.5], 1: [0.5, 0.7]}) is None
    found = detector.check(4, {0: [0.7, 0.3], 1: [0.1, 0.9]})
    assert found is not None
    assert (found.layer, found.expert) == (1, 1)


def test_collapse_early_stop_ends_the_run(tiny_config: RunConfig) -> None:
    monitor = replace(
        tiny_config.monitor,
        collapse_threshold=0.01,
        collapse_checks=2,
        collapse_every=1,
        collapse_early_stop=True,
        log_router_every=100,
    )
    result = run_experiment(replace(tiny_config, monitor=monitor))
    run = RunFolder(Path(tiny_config.output_dir) / "tiny")
    # what the detector saw is on record, however rarely the router is logged
    rows = [row for row in read_metrics(run.metrics) if "router/layer_1_expert_0_frac" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert result.status == read_json(run.summary)["status"] == "collapsed"
    assert read_json(run.summary)["final_step"] == 2
    assert (run.final_model / "model.safetensors").exists()
    assert run.checkpoint_steps()[-1] == 2
    # a collapsed run is finished: resuming it does nothing
    assert (
        run_experiment(replace(tiny_config, monitor=monitor, resume="auto")).status == "collapsed"
    )


def test_a_collapse_is_counted_across_a_resume(tiny_config: RunConfig) -> None:
    monitor = replace(
        tiny_config.monitor,
        collapse_threshold=0.01,
        collapse_checks=3,
        collapse_every=1,
        collapse_early_stop=True,
    )
    config = replace(tiny_config, monitor=monitor)
    assert run_experiment(replace(config, stop_after=2)).status == "interrupted"
    assert run_experiment(replace(config, resume="auto")).status == "collapsed"
    run = RunFolder(Path(tiny_config.output_dir) / "tiny")
    assert read_json(run.summary)["final_step"] == 3


def test_metrics_file_drops_what_was_cut_off(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.keep_up_to(5)
    writer.append([{"step": step, "x": step / 3} for step in range(1, 6)])
    with writer.path.open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "x')
    writer.keep_up_to(3)
    assert [row["step"] for row in read_metrics(writer.path)] == [1, 2, 3]
    writer.append([{"step": 4, "x": 0.1}])
    assert read_metrics(writer.path)[-1] == {"step": 4, "x": 0.1}


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full to stand for a full disk")
    with pytest.raises(RunError, match=r"No space left.*--output-dir") as failure:
        MetricsWriter(full).append([{"step": 1}])
    assert "\n" not in str(failure.value)
    path = tmp_path / "config.json"
    write_json(path, {"a": 1})
    (tmp_path / "not-a-folder").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        write_json(tmp_path / "not-a-folder" / "config.json", {"a": 2})
    assert read_json(path) == {"a": 1}


def test_rows_up_to_the_first_nan_are_kept() -> None:
    rows = [
        {"step": 1, "train/lm_loss": 1.0},
        {"step": 2, "train/lm_loss": 1.0, "train/grad_norm": float("inf")},
        {"step": 3, "train/lm_loss": float("nan")},
    ]
    good, failure = check_finite(rows)
    assert good == rows[:1]
    assert failure == "train/grad_norm is inf at step 2"


def test_a_tracker_that_fails_warns_once_and_training_goes_on(
    tiny_config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(Path(tiny_config.output_dir) / "tiny")
    run.root.mkdir(parents=True)
    # the tracker's folder is taken by a file
    (run.root / "tensorboard").write_text("")
    config = replace(
        tiny_config,
        resume="auto",
        monitor=replace(tiny_config.monitor, track="tensorboard"),
    )
    with caplog.at_level(logging.WARNING, "moe_emergence"):
        assert run_experiment(config).status == "completed"
    warnings = [r.message for r in caplog.records if "--track tensorboard failed" in r.message]
    assert len(warnings) == 1
    assert read_metrics(run.metrics)[-1]["step"] == 6


def test_bf16_trains_close_to_fp32_and_keeps_fp32_weights(tiny_config: RunConfig) -> None:
    config = replace(tiny_config, optim=replace(tiny_config.optim, precision="bf16"))
    run_experiment(config)
    run = RunFolder(Path(config.output_dir) / "tiny")
    assert read_json(run.environment)["precision"] == "bf16"
    weights = load_file(run.final_model / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    AcceleratorState._reset_state(reset_partial_state=True)
    run_experiment(replace(tiny_config, run_name="fp32"))
    exact = RunFolder(Path(config.output_dir) / "fp32")
    for row, other in zip(read_metrics(run.metrics), read_metrics(exact.metrics), strict=True):
        for key in ("train/lm_loss", "eval/lm_loss", "train/lb_loss"):
            if key in row:
                # bf16 has 8 bits: one rounding is 2^-9 of the value
                assert row[key] == pytest.approx(other[key], rel=2**-7), (row["step"], key)
                assert row[key] != other[key] or key != "train/lm_loss"


def test_tensorboard_gets_every_row(tiny_config: RunConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = replace(tiny_config.monitor, track="tensorboard")
    run_experiment(replace(tiny_config, monitor=monitor))
    run = RunFolder(Path(tiny_config.output_dir) / "tiny")
    events = EventAccumulator(str(run.root / "tensorboard"))
    events.Reload()
    recorded = {event.step: event.value for event in events.Scalars("train/lm_loss")}
    rows = [row for row in read_metrics(run.metrics) if "train/lm_loss" in row]
    assert recorded == pytest.approx({row["step"]: row["train/lm_loss"] for row in rows})
    assert {e.step for e in events.Scalars("eval/lm_loss")} == {0, 3, 6}


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_is_asked_for_only_when_wanted(
    name: Any, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = replace(tiny_config, monitor=replace(tiny_config.monitor, track=name))
    message = rf"--track {name}.*pip install 'moe-emergence\[{name}\]'"
    with pytest.raises(ValueError, match=message):
        run_experiment(config)
    assert not Path(config.output_dir).exists()


class StandInForTrackio(ModuleType):
    """As much of trackio as accelerate's tracker calls."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.finished = 0

    def init(self, **options: Any) -> "StandInForTrackio":
        self.started.append(options)
        self.config = StandInConfig()
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append({"step": step, **values})

    def finish(self) -> None:
        self.finished += 1


class StandInConfig(dict[str, Any]):
    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:  # type: ignore[override]
        super().update(values)


def test_trackio_gets_every_row_of_its_run(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackio = StandInForTrackio()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    config = replace(tiny_config, monitor=replace(tiny_config.monitor, track="trackio"))
    run_experiment(config)
    run = RunFolder(Path(config.output_dir) / "tiny")
    rows = read_metrics(RunFolder(run.root / "dense-base").metrics) + read_metrics(run.metrics)
    assert trackio.logged == rows
    names = [options["name"] for options in trackio.started]
    assert names == ["tiny base", "tiny"]
    assert all(options["resume"] == "allow" for options in trackio.started)
    assert trackio.config["optim.max_steps"] == 6
    assert trackio.finished == 2

"""A signal ends a command in every phase: in time, with one line, and nothing half made."""

import signal
from pathlib import Path

import pytest
from signal_moments import TRAINING, at_moment, strays

from moe_emergence.errors import exit_code
from moe_emergence.interrupt import SIGNALS
from moe_emergence.run_folder import RunFolder, read_json
from moe_emergence.train import main as train_command

pytestmark = pytest.mark.slow

TRAIN = ("-m", "moe_emergence.train")
MATRIX = [(name, SIGNALS[i % len(SIGNALS)]) for i, name in enumerate(TRAINING)]
MATRIX += [("step", number) for number in SIGNALS]


@pytest.mark.parametrize(("name", "number"), MATRIX, ids=lambda v: str(getattr(v, "name", v)))
def test_training_ends_in_every_phase(
    name: str, number: signal.Signals, tiny_flags: list[str], tmp_path: Path
) -> None:
    moment = TRAINING[name]
    cache = ["--cache-dir", str(tmp_path / "cache")]
    done = at_moment([*TRAIN, *tiny_flags, *cache], moment, [number], tmp_path / "here")
    done.assert_tidy()
    assert done.code == 128 + number, done.stderr
    assert not strays(tmp_path)
    run = RunFolder(tmp_path / "runs" / "tiny")
    if moment.finishes_step:
        assert f"{number.name}: stopping after this step" in done.stderr
        assert "to go on:" in done.stdout
        assert not done.errors()
        assert read_json(run.summary)["status"] == "interrupted"
    else:
        assert done.errors() == [f"error: interrupted by {number.name}"]
        assert ("to go on: python -m moe_emergence.train" in done.stderr) == (name != "parsing")
    if run.root.exists() and name != "figures":
        assert read_json(run.summary)["status"] == "interrupted"


@pytest.mark.parametrize("name", ["step", "swap of a folder", "making a cache"])
def test_a_signal_that_insists_ends_at_once(
    name: str, tiny_flags: list[str], tmp_path: Path
) -> None:
    """At once, but for a folder that is being swapped in."""
    cache = ["--cache-dir", str(tmp_path / "cache")]
    flags = [*tiny_flags, *cache]
    done = at_moment([*TRAIN, *flags], TRAINING[name], [signal.SIGTERM] * 2, tmp_path / "here")
    done.assert_tidy()
    assert done.code == 143, done.stderr
    assert exit_code(train_command, [*flags, "--resume", "auto"]) == 0
    run = RunFolder(tmp_path / "runs" / "tiny")
    assert read_json(run.summary)["status"] == "completed"
    assert not strays(run.root)

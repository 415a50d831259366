"""Commands that are killed with SIGKILL: the short form of `kill_storm.py`, and what it found."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from kill_storm import Tally, contents, differences, scenarios, storm
from killed_lives import Life, wait_for_orphans
from small_texts import write_texts

from moe_emergence.run_folder import RunFolder, read_json
from moe_emergence.verify import VerifyConfig
from moe_emergence.verify.work import _Writer

pytestmark = pytest.mark.slow


def test_a_training_outlives_kills_at_any_moment(tmp_path: Path) -> None:
    train = next(s for s in scenarios(tmp_path) if s.name == "train")
    tally = Tally()
    for tally in storm(train, 5, 1, tmp_path):
        assert not tally.failures
    assert tally.kills.total() >= 5
    assert len(tally.kills) > 2


def test_what_a_kill_could_leave_is_seen(tmp_path: Path) -> None:
    """A row twice, a file too many, a file too few, other bits."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    for name, text in (("metrics.jsonl", '{"step": 1}\n'), ("a.csv", "1"), ("b.csv", "2")):
        good.mkdir(exist_ok=True)
        (good / name).write_text(text)
    shutil.copytree(good, bad)
    assert differences(contents(good), contents(bad)) == []
    (bad / "metrics.jsonl").write_text('{"step": 1}\n{"step": 1}\n')
    (bad / ".a.csv.12.tmp").touch()
    (bad / "a.csv").unlink()
    (bad / "b.csv").write_text("3")
    assert differences(contents(good), contents(bad)) == [
        ".a.csv.12.tmp is left over", "a.csv is missing", "b.csv differs", "metrics.jsonl differs",
    ]  # fmt: skip


def test_a_suite_that_is_killed_takes_its_runs_with_it(tmp_path: Path) -> None:
    """The workers, of sessions of their own, stop within seconds, each with a checkpoint."""
    suite = next(s for s in scenarios(tmp_path) if s.name == "suite")
    toml = tmp_path / "suite.toml"
    toml.write_text(toml.read_text().replace('"optim.max_steps" = 2', '"optim.max_steps" = 200'))
    only = replace(suite, flags=(*suite.flags, "--only", "dense"))
    folder, notes = tmp_path / "work", tmp_path / "notes"
    for path in (folder, notes):
        path.mkdir()
    write_texts(folder / "texts")
    base = RunFolder(folder / "suite" / "base" / "seed-0")
    life = Life(only.module, only.flags, folder, notes, only.phases)
    until = time.monotonic() + 120
    while not base.checkpoint_steps() and time.monotonic() < until:
        time.sleep(0.02)
    workers = psutil.Process(life.pid).children()
    life.kill()
    assert life.end().killed
    assert len(workers) == 1
    assert wait_for_orphans(workers, 20) == []
    summary = read_json(base.summary)
    assert summary["status"] == "interrupted"
    assert 0 < summary["final_step"] < 200
    assert base.checkpoint_steps()[-1] == summary["final_step"]
    log = folder / "suite" / "logs" / "base-seed-0.log"
    assert "the process that began this one has ended" in " ".join(log.read_text().split())


def test_verify_clears_away_what_a_killed_one_left(tmp_path: Path) -> None:
    path, other = tmp_path / "certificate.json", tmp_path / ".another.json.12.tmp"
    other.touch()
    (tmp_path / ".certificate.json.12.tmp").touch()
    _Writer(VerifyConfig(json=str(path)), torch.device("cpu")).add([])
    assert {p.name for p in tmp_path.iterdir()} == {path.name, other.name}

"""The program for a GPU, rehearsed on a CPU: nothing measured is lost, whatever a stage does."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from warm_commands import run_warm

pytest.importorskip("triton", reason="the stages run Triton's kernels, which is not installed")

from benchmarks.gpu import layers, pack, program, report, runs, stages
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.checks import kept_output
from benchmarks.gpu.program import Fields, Journal, OutOfTime, Setting, Stage, run_stages

pytestmark = pytest.mark.slow


def good(setting: Setting) -> Iterator[Fields]:
    yield {"row": 1}
    yield {"row": 2}


def raising(setting: Setting) -> Iterator[Fields]:
    yield {"row": 1}
    raise RuntimeError("the reason")


def dying(setting: Setting) -> Iterator[Fields]:
    yield {"row": 1}
    time.sleep(0.2)  # the row is on its way
    os._exit(139)


def cut_short(setting: Setting) -> Iterator[Fields]:
    yield {"row": 1}
    raise OutOfTime


def test_a_stage_that_leaves_something_out_is_not_complete(tmp_path: Path) -> None:
    complete, found = run(tmp_path, Stage("cut", cut_short, 60))
    assert not complete
    assert (found["cut"]["state"], found["cut"]["rows"]) == ("out of time", [{"row": 1}])


def test_no_time_for_all_layers_is_said(tmp_path: Path) -> None:
    complete, found = run(tmp_path, Stage("layers", layers.layers, 4), seconds=4)
    assert not complete
    assert found["layers"]["state"] == "out of time"


def endless(setting: Setting) -> Iterator[Fields]:
    yield {"row": 1}
    while True:
        time.sleep(0.1)


def run(tmp_path: Path, *chosen: Stage, seconds: float = 60.0) -> tuple[bool, dict[str, Fields]]:
    journal = Journal.open(tmp_path / "gpu.json", {"commit": "c", "device_name": "d"})
    setting = Setting("cpu", True, str(tmp_path), 1, time.time() + seconds)
    complete = run_stages(chosen, journal, setting)
    written: dict[str, Fields] = program.read_journal(tmp_path / "gpu.json")["stages"]
    assert written == journal.stages
    return complete, written


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the first process imports takes longer than the stages here may."""
    run(tmp_path_factory.mktemp("warm"), Stage("a", good, 60), seconds=120)


def test_a_stage_that_fails_or_dies_keeps_its_rows_and_the_next_one_runs(tmp_path: Path) -> None:
    chosen = (Stage("a", raising, 9), Stage("b", dying, 9), Stage("c", good, 9))
    complete, found = run(tmp_path, *chosen)
    assert not complete
    assert [found[name]["state"] for name in "abc"] == ["failed", "died", "complete"]
    assert [len(found[name]["rows"]) for name in "abc"] == [1, 1, 2]
    assert "the reason" in found["a"]["error"]
    assert str(pack.REPOSITORY) not in found["a"]["error"]
    assert "139" in found["b"]["error"]


def test_a_stage_is_stopped_when_its_time_is_over(tmp_path: Path) -> None:
    complete, found = run(tmp_path, Stage("a", endless, 1), Stage("b", good, 20))
    assert not complete
    assert (found["a"]["state"], found["a"]["rows"]) == ("out of time", [{"row": 1}])
    assert found["b"]["state"] == "complete"


def test_what_cannot_finish_is_not_begun(tmp_path: Path) -> None:
    complete, found = run(tmp_path, Stage("a", good, 1000), Stage("b", good, 20))
    assert not complete
    assert (found["a"]["state"], found["b"]["state"]) == ("no time left", "complete")


def test_complete_stages_are_kept_for_the_same_commit_only(tmp_path: Path) -> None:
    run(tmp_path, Stage("a", good, 9))
    complete, found = run(tmp_path, Stage("a", raising, 9))
    assert complete
    assert found["a"]["rows"] == [{"row": 1}, {"row": 2}]
    other = Journal.open(tmp_path / "gpu.json", {"commit": "other", "device_name": "d"})
    assert other.stages == {}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages that are no test's or another suite's already; training has a test of its own."""
    folder: Path = tmp_path_factory.mktemp("gpu")
    chosen = ["layers", "taken-apart", "correctness"]
    here = ["--environment", sys.executable]
    main(["rehearse", "--out", str(folder), *here, "--stages", *chosen])
    return folder / "gpu.json"


def placed(setting: Setting) -> Iterator[Fields]:
    yield {"note": f"it waits at {pack.REPOSITORY / 'benchmarks' / 'grid.py'}:1", "rounds": 3}
    yield {"last_lines": [f"{torch.__file__}:2: a warning"]}


def test_rows_do_not_say_where_things_lie(tmp_path: Path) -> None:
    _, found = run(tmp_path, Stage("placed", placed, 60))
    here = {"note": f"it waits at {Path('benchmarks', 'grid.py')}:1", "rounds": 3}
    assert found["placed"]["rows"] == [here, {"last_lines": ["torch/__init__.py:2: a warning"]}]


def test_a_stage_that_was_not_begun_is_in_the_report(tmp_path: Path) -> None:
    packages = {"torch": "2"}
    known = dict.fromkeys(("device_name", "command", "commit", "date", "driver", "cuda"), "x")
    journal = Journal(tmp_path / "gpu.json", {**known, "python": "3", "packages": packages})
    run_stages([Stage("long", good, 1e6)], journal, Setting("cpu", True, "", 1, time.time()))
    assert "| long | no time left |" in report.write_report(journal.path, tmp_path).read_text(
        "utf-8"
    )


def test_the_rehearsal_has_every_stage(rehearsed: Path) -> None:
    found = program.read_journal(rehearsed)["stages"]
    assert {s["state"] for s in found.values()} == {"complete"}
    assert {r["verdict"] for r in found["correctness"]["rows"]} == {"passed"}
    assert str(pack.REPOSITORY) not in rehearsed.read_text("utf-8")


def test_the_training_stage_trains_a_base_and_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept_output(command: list[str], log: str, setting: Setting) -> Fields:
        assert command[0] == sys.executable
        done = run_warm(*command[1:], where=pack.REPOSITORY, logs=tmp_path)
        return {"exit": done.returncode, "last_lines": done.stderr.splitlines()[-25:], "seconds": 1}

    monkeypatch.setattr(runs, "kept_output", kept_output)
    rows = [*runs.short_training(Setting("cpu", True, str(tmp_path), 1, time.time() + 300))]
    assert [row["status"] for row in rows] == ["completed"] * 2
    assert [row["run"] for row in rows] == ["train-base", "train-graph-off"]
    assert all(row["last"]["eval/lm_loss"] < row["first"]["eval/lm_loss"] for row in rows)
    assert "expert_domain" in rows[1]


def test_output_is_kept_with_how_it_ended(tmp_path: Path) -> None:
    setting = Setting("cpu", True, str(tmp_path), 1, time.time() + 12)
    script = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    for _ in range(2):  # the second one says nothing of the first
        found = kept_output([sys.executable, "-c", script], "some.log", setting)
        assert (found["exit"], sorted(found["last_lines"])) == (3, ["err", "out"])
    assert (tmp_path / "some.log").read_text("utf-8").count("out") == 2
    sleep = "import time; print('begun', flush=True); time.sleep(60)"
    found = kept_output([sys.executable, "-c", sleep], "some.log", setting)
    assert found["exit"] == "out of time"
    assert "begun" in found["last_lines"][0]


def test_the_report_shows_every_row_of_the_layers(rehearsed: Path, tmp_path: Path) -> None:
    text = report.write_report(rehearsed, tmp_path).read_text("utf-8")
    for row in program.read_journal(rehearsed)["stages"]["layers"]["rows"]:
        assert f"| {row['contestant']} | {row['verdict']} | {row['median_s'] * 1e6:,.0f} |" in text


def test_committed_results_have_their_report(tmp_path: Path) -> None:
    results = pack.REPOSITORY / "docs" / "results"
    for source in (
        path for machine in ("h100", "h200") for path in (results / machine).glob("*.json")
    ):
        text = report.write_report(source, tmp_path).read_text("utf-8")
        assert text == source.with_suffix(".md").read_text("utf-8")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"environment": {}, "stages": []}'])
def test_a_file_that_is_no_journal_is_named(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text(content, "utf-8")
    with pytest.raises(SystemExit, match=r"other\.json"):
        main(["report", str(path), "--out", str(tmp_path)])


def test_stage_names_are_those_of_the_document() -> None:
    text = (pack.REPOSITORY / "docs" / "gpu.md").read_text("utf-8")
    for stage in stages.STAGES:
        assert f"| `{stage.name}` |" in text


def test_packing_asks_for_wheels_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def note(command: list[str], **options: object) -> "subprocess.CompletedProcess[str]":
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="abc\n")

    monkeypatch.setattr(pack, "FOLDER", tmp_path)
    monkeypatch.setattr(subprocess, "run", note)
    assert pack.packed_commit() is None
    pack.pack()
    assert pack.packed_commit() == "abc"
    assert set(pack.WHEELS) <= set(asked[0])
    assert json.dumps(asked[0]).count("--platform") == len(pack.PLATFORMS)

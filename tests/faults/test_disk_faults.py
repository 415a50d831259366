"""A disk that fails at a sample of calls of each kind; `disk_faults.py` tries all of them.

And the order of calls on a disk that is well: what is named is on the disk before its name.
"""

import errno
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from disk import CHANGES, NOT_MOUNTED, READS, Call, find_compiler
from disk_faults import DISKS, UNREADABLE, Scenario, Trial, chosen_calls, trials

from moe_emergence.disk import append, clear_unfinished, whole_file, whole_folder, write_text
from moe_emergence.errors import RunError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_compiler() is None, reason="the shim that fails calls needs Linux and a C compiler"
    ),
]

SAMPLE = (
    ("train", "full"),
    ("frozen", "read-only from then on"),
    ("resume", "unreadable"),
    ("tuning", "broken from then on"),
    ("prepared", "full"),
    ("routing", "broken from then on"),
    ("callback", "over quota"),
    ("suite", "over quota"),
    ("gallery", "broken from then on"),
    ("tidied", "read-only from then on"),
)
"""Scenarios and disks."""


@pytest.fixture(scope="module")
def tried() -> Iterator[tuple[Trial, dict[str, Scenario]]]:
    with trials() as found:
        yield found


@pytest.mark.parametrize(("name", "disk"), SAMPLE)
def test_one_line_and_nothing_lost(
    tried: tuple[Trial, dict[str, Scenario]], name: str, disk: str
) -> None:
    trial, scenarios = tried
    fault = UNREADABLE if disk == "unreadable" else DISKS[disk]
    one_of_each_kind = chosen_calls(trial, scenarios[name], fault.kinds, each=10**6, seed=0)
    n = random.Random(f"{name} {disk}").choice(one_of_each_kind)
    trial.fails_well(scenarios[name], replace(fault, n=n))


def test_short_writes_are_finished(tried: tuple[Trial, dict[str, Scenario]]) -> None:
    trial, scenarios = tried
    calls = trial.undisturbed(scenarios["train"]).calls
    writes = [n for n, call in enumerate(calls, start=1) if call.name == "write"]
    fault = replace(DISKS["short write"], n=writes[len(writes) // 2])
    assert trial.fails_well(scenarios["train"], fault) == "went on, equal"


@pytest.mark.parametrize("name", ["train", "frozen", "prepared", "routing", "tuning", "gallery"])
def test_what_has_a_name_is_on_the_disk(
    tried: tuple[Trial, dict[str, Scenario]], name: str
) -> None:
    trial, scenarios = tried
    assert_durable(trial.undisturbed(scenarios[name]).calls)


def assert_durable(calls: list[Call]) -> None:
    """Each file is synced after its last write and before it, or a folder above, is renamed; the
    folder that holds the new name is synced after that, before anything else is renamed."""
    renames = [(n, call) for n, call in enumerate(calls) if call.name == "rename" and call.to]
    assert renames
    for n, call in renames:
        assert call.to is not None
        if call.to.name.endswith(".old"):
            continue
        before, after = calls[:n], calls[n + 1 :]
        of_it = [c for c in before if c.path == call.path or call.path in c.path.parents]
        # libraries may write a file of their own name first, and rename it in ways of their own
        written = {c.path for c in of_it if "write" in c.name}
        for path in {call.path, *(p for p in written if not p.name.startswith(".tmp"))}:
            of_path = [c.name for c in of_it if c.path == path and c.name not in ("open", "mkdir")]
            assert of_path[-1:] == ["fsync"], f"{path} is renamed before it is synced"
        until = next((k for k, c in enumerate(after) if c.name == "rename"), len(after))
        removed = call.to.name.endswith(".tmp")
        assert removed or any(
            c.name == "fsync" and c.path == call.to.parent for c in after[:until]
        ), f"the name {call.to} is not synced"


def test_metrics_are_on_the_disk_before_the_checkpoint_that_counts_on_them(
    tried: tuple[Trial, dict[str, Scenario]],
) -> None:
    trial, scenarios = tried
    calls = trial.undisturbed(scenarios["train"]).calls
    named = [
        n for n, c in enumerate(calls)
        if c.name == "rename" and c.to and c.to.name.startswith("step-")
    ]  # fmt: skip
    assert len(named) == 4
    for n in named:
        of_run = calls[n].path.parents[1] / "metrics.jsonl"
        last = [c.name for c in calls[:n] if c.path == of_run and c.name in ("write", "fsync")]
        assert last[-1] == "fsync"


def test_folders_below_a_new_folder_are_synced_too(
    tried: tuple[Trial, dict[str, Scenario]],
) -> None:
    trial, scenarios = tried
    calls = trial.undisturbed(scenarios["nested"]).calls
    assert_durable(calls)
    synced = [call.path.name for call in calls if call.name == "fsync"]
    assert {"below", "file"} <= set(synced)


def test_a_full_disk_that_is_one(tried: tuple[Trial, dict[str, Scenario]]) -> None:
    """A file system of 600 kB, and no shim."""
    trial, scenarios = tried
    trial.begin(scenarios["train"])
    ended = trial.disk.run(scenarios["train"].argv(trial.below), trial.below, size=600_000)
    if ended.code == NOT_MOUNTED:
        pytest.skip("this system lets nobody mount a small file system")
    last = ended.stderr.splitlines()[-1]
    assert ended.code == 1, ended.stderr
    assert last.startswith(f"error: cannot write {trial.below}"), ended.stderr
    assert "No space left" in last
    assert "Traceback" not in ended.stderr


def fail_halfway(place: Path, error: BaseException) -> None:
    place.write_text("half")
    raise error


def test_a_failure_of_something_else_keeps_its_kind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), whole_file(tmp_path / "a") as new:
        fail_halfway(new, KeyError("b"))
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "a") as new:
        fail_halfway(new / "b", KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_outlasts_a_failure(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    write_text(tmp_path / "a", "one")
    with (
        pytest.raises(RunError, match=r"cannot write .*a: No space"),
        whole_file(tmp_path / "a") as new,
    ):
        fail_halfway(new, full)
    assert (tmp_path / "a").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_only_what_is_unfinished_and_idle_is_cleared(tmp_path: Path) -> None:
    names = [".a.0123abc.tmp", ".b.12.old", ".hidden", ".c.12.tmp.kept", "d.12.tmp"]
    for name in names:
        (tmp_path / name).write_text(name)
    clear_unfinished(tmp_path, idle_seconds=60)
    assert len(list(tmp_path.iterdir())) == len(names)
    clear_unfinished(tmp_path)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [".c.12.tmp.kept", ".hidden", "b", "d.12.tmp"]


def test_what_another_process_has_finished_by_now_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / ".a.12.tmp").symlink_to("nowhere")  # seen in the folder, and not there
    (tmp_path / ".b.12.tmp").write_text("half")
    clear_unfinished(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".a.12.tmp"]


def test_appending_makes_the_folder(tmp_path: Path) -> None:
    append(tmp_path / "a" / "b.jsonl", b"one\n")
    append(tmp_path / "a" / "b.jsonl", b"two\n")
    assert (tmp_path / "a" / "b.jsonl").read_text() == "one\ntwo\n"


def test_the_shim_sees_writes_of_every_language(tried: tuple[Trial, dict[str, Scenario]]) -> None:
    """Python's, torch's, safetensors' and numpy's: a tensor file's write is counted."""
    trial, scenarios = tried
    for name, suffix in (("train", "tokenizer.json"), ("frozen", ".npy"), ("train", "trainer.pt")):
        calls = trial.undisturbed(scenarios[name], CHANGES).calls
        assert any("write" in c.name and suffix in c.path.name for c in calls), suffix
    reads = trial.undisturbed(scenarios["resume"], READS).calls
    assert any(c.path.name == "model.safetensors" for c in reads)

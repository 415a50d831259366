"""Every write of every command fails once: what is left, and what the next start makes of it.

    PYTHONPATH=.:kernels:tests:tests/faults python tests/faults/disk_faults.py --json faults.json

A command is run undisturbed to count its calls below one folder; then again for each call, which
fails. It has to end with one line, leave what was whole as it was and nothing half made, and, once
the disk is well, come to what the undisturbed one came to.
"""

import argparse
import contextlib
import errno
import filecmp
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from conftest import flags_of, tiny
from disk import CHANGES, FROM_THEN_ON, READS, SHORT, Disk, Ended, Fault, find_compiler
from equal_runs import assert_same_run
from small_writers import WRITERS

from moe_emergence.config import SHIPPED
from moe_emergence.run_folder import RunFolder, read_json
from moe_emergence.training.checkpoint import load_checkpoint
from moe_emergence.training.experiment import run_experiment

DISKS = {
    "full": Fault(error=errno.ENOSPC, how=FROM_THEN_ON),
    "full for a moment": Fault(error=errno.ENOSPC),
    "over quota": Fault(error=errno.EDQUOT, how=FROM_THEN_ON),
    "input/output error": Fault(error=errno.EIO),
    "broken from then on": Fault(error=errno.EIO, how=FROM_THEN_ON),
    "read-only from then on": Fault(error=errno.EROFS, how=FROM_THEN_ON),
    "short write": Fault(how=SHORT),
}
UNREADABLE = Fault(error=errno.EIO, kinds=READS)


@dataclass(frozen=True)
class Scenario:
    """A command, and what is on the disk before it."""

    name: str
    argv: Callable[[Path], list[str]]
    """Of the folder with the faults."""
    again: Callable[[Path], list[str]]
    """The next start; the same one where that is how to go on."""
    same: Callable[[Path, Path], None]
    """Raises where the second folder is not what the first one, undisturbed, is."""
    before: Path | None = None
    """Copied to where the command runs."""


class Trial:
    """Scenarios on one disk, in a scratch folder."""

    def __init__(self, disk: Disk, scratch: Path) -> None:
        self.disk, self.scratch = disk, scratch
        self.below = scratch / "below"
        self._references: dict[str, tuple[Path, Ended]] = {}

    def undisturbed(self, scenario: Scenario, kinds: int = CHANGES) -> Ended:
        """How the command ends on a disk that is well, and its calls."""
        name = f"{scenario.name}-{kinds}"
        if name not in self._references:
            self.begin(scenario)
            ended = self.disk.run(scenario.argv(self.below), self.below, Fault(kinds=kinds))
            assert ended.code == 0, ended.stderr
            kept = self.scratch / "undisturbed" / name
            kept.parent.mkdir(exist_ok=True)
            self.below.rename(kept)
            self._references[name] = kept, ended
        return self._references[name][1]

    def fails_well(self, scenario: Scenario, fault: Fault) -> str:
        """What came of it, in a word; raises AssertionError where that is not as it should be."""
        calls = self.undisturbed(scenario, fault.kinds).calls
        self.begin(scenario)
        ended = self.disk.run(scenario.argv(self.below), self.below, fault)
        lines = ended.stderr.splitlines()
        shown = f"{scenario.name}, {fault} ({calls[fault.n - 1]}):\n{ended.stderr[-3000:]}"
        assert "Traceback" not in ended.stderr, shown
        if ended.code:
            allowed = (1,) if fault.kinds == CHANGES else (1, 2)
            assert ended.code in allowed, f"exit code {ended.code}: {shown}"
            assert lines[-1].startswith("error: "), shown
            assert str(self.scratch) in lines[-1], shown
            assert sum(line.startswith("error: ") for line in lines) == 1, shown
        left = unfinished(self.below)
        # where the disk lets nothing be removed, no name be put back, or does not say that the
        # new name is there to stay: then the old folder is kept
        kept = calls[fault.n - 1].name in ("rename", "fsync")
        refuses = fault.error in (errno.EROFS, errno.EIO) or kept
        assert not left or (ended.code and refuses), f"left {left}: {shown}"
        for folder in self.below.rglob("step-*"):
            if folder.is_dir() and not any(p.name.startswith(".") for p in folder.parents):
                load_checkpoint(folder)
        if ended.code:
            after = self.disk.run(scenario.again(self.below), self.below)
            assert after.code == 0, f"the next start: {after.stderr[-2000:]}\nafter {shown}"
            # the cache may be somebody else's: it is cleared of what is a day old
            left = [path for path in unfinished(self.below) if not path.startswith("cache")]
            assert not left, f"the next start left {left}, after {shown}"
        reference = self._references[f"{scenario.name}-{fault.kinds}"][0]
        try:
            scenario.same(reference, self.below)
        except AssertionError as error:
            raise AssertionError(f"not the same: {error}\nafter {shown}") from error
        return "one line, then equal" if ended.code else "went on, equal"

    def begin(self, scenario: Scenario) -> None:
        shutil.rmtree(self.below, ignore_errors=True)
        if scenario.before is None:
            self.below.mkdir()
        else:
            shutil.copytree(scenario.before, self.below)


def unfinished(folder: Path) -> list[str]:
    """Files and folders that are not whole, by their names."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*"))


def same_run(one: Path, other: Path) -> None:
    for name in ("", "dense-base"):
        a, b = RunFolder(one / "runs/tiny" / name), RunFolder(other / "runs/tiny" / name)
        if not name:
            assert_same_run(a, b)
            assert a.expert_domain.read_text() == b.expert_domain.read_text()
        assert a.data_manifest.read_bytes() == b.data_manifest.read_bytes()
        configs = [read_json(run.config) | {"resume": None} for run in (a, b)]
        assert configs[0] == configs[1]
    names = [sorted(p.name for p in (f / "runs/tiny").iterdir()) for f in (one, other)]
    assert names[0] == names[1], names


def same_tables(one: Path, other: Path) -> None:
    names = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*")) for f in (one, other)]
    assert names[0] == names[1], set(names[0]) ^ set(names[1])
    for table in one.rglob("*.csv"):
        assert filecmp.cmp(table, other / table.relative_to(one), shallow=False), table


def same_files(one: Path, other: Path) -> None:
    def files(folder: Path) -> dict[str, Path]:
        found = (p for p in folder.rglob("[!.]*") if p.suffix not in (".txt", ".bin"))
        return {p.relative_to(folder).as_posix(): p for p in found if p.is_file()}

    a, b = files(one), files(other)
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for name in a:
        assert filecmp.cmp(a[name], b[name], shallow=False), name


def same_verdict(one: Path, other: Path) -> None:
    counts = [json.loads((f / "verify.json").read_text())["counts"] for f in (one, other)]
    assert counts[0] == counts[1], counts


def make_scenarios(scratch: Path) -> dict[str, Scenario]:
    """All of them; a small run is trained for those that read one."""
    data = scratch / "data"
    data.mkdir()
    write_texts(data)
    config = tiny(data, scratch / "below" / "cache", scratch / "below")
    monitor = replace(config.monitor, track="tensorboard")
    config = replace(config, monitor=monitor)
    frozen = replace(config, model=replace(config.model, frozen_layers=1))
    done = tiny(data, scratch / "done" / "cache", scratch / "done")
    run_experiment(replace(done, stop_after=3))
    run = scratch / "done" / "runs" / "tiny"
    found = [
        Scenario(
            name,
            lambda below, c=c: ["moe_emergence.train", *flags_of(c)],  # type: ignore[misc]
            lambda below, c=c: ["moe_emergence.train", *flags_of(c), "--resume", "auto"],  # type: ignore[misc]
            same_run,
        )
        for name, c in (("train", config), ("frozen", frozen))
    ]
    resumed = replace(config, monitor=replace(monitor, track="none"), resume="auto")
    resume = ["moe_emergence.train", *flags_of(resumed)]
    found.append(Scenario("resume", lambda _: resume, lambda _: resume, same_run, scratch / "done"))

    def analyze(below: Path) -> list[str]:
        few = ["--permutations", "19", "--device", "cpu", "--max-tokens", "500"]
        return ["moe_emergence.analyze", str(run), "--out", str(below / "out"), *few]

    found.append(Scenario("analyze", analyze, analyze, same_tables))

    def verify(below: Path) -> list[str]:
        few = ["--device", "cpu", "--cases", "0", "--dtype", "fp64", "--activation", "swiglu"]
        return ["moe_emergence.verify", *few, "--json", str(below / "verify.json")]

    found.append(Scenario("verify", verify, verify, same_verdict))
    for name in WRITERS:

        def write(below: Path, name: str = name) -> list[str]:
            return ["small_writers", name, str(below)]

        before = untidy(scratch / "untidy") if name == "tidied" else None
        found.append(Scenario(name, write, write, same_files, before))
    return {scenario.name: scenario for scenario in found}


def untidy(folder: Path) -> Path:
    """A run with what a suite deletes."""
    run = RunFolder(folder / "run")
    for path in (run.checkpoints, run.best_model, run.final_model):
        path.mkdir(parents=True)
        (path / "weights").write_bytes(b"some")
    return folder


def write_texts(folder: Path) -> None:
    """Forty short documents of each domain."""
    rng = random.Random(0)
    for domain in SHIPPED:
        words = [f"{domain}{i}" for i in range(30)] + ["and", "the", "of"]
        rows = (json.dumps({"text": " ".join(rng.choices(words, k=60))}) for _ in range(40))
        (folder / f"{domain}.jsonl").write_text("".join(f"{row}\n" for row in rows), "utf-8")


@contextlib.contextmanager
def trials() -> Iterator[tuple[Trial, dict[str, Scenario]]]:
    """A trial and the scenarios, in memory where the system has a place there."""
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=place, prefix="disk") as name:
        scratch = Path(name).resolve()
        scenarios = make_scenarios(scratch)
        with Disk(scratch) as disk:
            yield Trial(disk, scratch), scenarios


def chosen_calls(trial: Trial, scenario: Scenario, kinds: int, each: int, seed: int) -> list[int]:
    """Numbers of calls: every one, or of each kind of call every `each`-th, beginning anywhere."""
    calls = trial.undisturbed(scenario, kinds).calls
    rng = random.Random(f"{scenario.name} {kinds} {seed}")
    by_kind: dict[str, list[int]] = {}
    for n, call in enumerate(calls, start=1):
        by_kind.setdefault(call.name, []).append(n)
    of_kinds = (found[rng.randrange(min(each, len(found))) :: each] for found in by_kind.values())
    return sorted(n for some in of_kinds for n in some)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write what came of every call")
    parser.add_argument("--only", nargs="*", default=[], help="scenarios")
    parser.add_argument("--disks", nargs="*", default=[*DISKS, "unreadable"])
    parser.add_argument("--each", type=int, default=1, help="every so many calls of a kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if not find_compiler():
        sys.exit("needs Linux and a C compiler")
    rows, began = [], time.time()
    with trials() as (trial, scenarios):
        for name, scenario in scenarios.items():
            if options.only and name not in options.only:
                continue
            for disk in options.disks:
                fault = UNREADABLE if disk == "unreadable" else DISKS[disk]
                numbers = chosen_calls(trial, scenario, fault.kinds, options.each, options.seed)
                results: Counter[str] = Counter()
                for n in numbers:
                    failure = ""
                    try:
                        result = trial.fails_well(scenario, replace(fault, n=n))
                    except Exception as error:  # noqa: BLE001 - all are counted
                        result, failure = "WRONG", f"{type(error).__name__}: {error}"
                        sys.stderr.write(failure + "\n")
                    results[result] += 1
                    call = trial.undisturbed(scenario, fault.kinds).calls[n - 1]
                    rows.append({"scenario": name, "disk": disk, "n": n, "call": call.name,
                                 "file": call.path.name, "result": result,
                                 "failure": failure})  # fmt: skip
                print(f"| {name} | {disk} | {len(numbers)} | {dict(results)} |", flush=True)
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1))
    wrong = sum(row["result"] == "WRONG" for row in rows)
    print(f"{len(rows)} faults, {wrong} wrong, {time.time() - began:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

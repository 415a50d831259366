"""SIGKILL at any moment: `python tests/faults/kill_storm.py --kills 1000 --seed 0 --out FOLDER`.

A command is killed, given again, killed again, until it ends by itself; then its folder must be
that of a command that was never killed: the same files, hidden ones included, and in them the same
but for times. A quarter of the lives end at a moment drawn from an uncut life's time, a quarter
before a file operation of a phase, drawn from all there are, and half before any file operation,
drawn from the first quarter of an uncut life's; so a run is killed several times. A suite is always
killed by the clock. Prints what was hit, and writes it to `storm.json` in the folder.
"""

import argparse
import json
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import psutil
import torch
from conftest import flags_of, tiny
from killed_lives import (
    ANALYZE_PHASES,
    TRAIN_PHASES,
    WORKER_PHASES,
    Aim,
    Life,
    operations,
    seconds,
    wait_for_orphans,
)
from small_texts import write_texts

from moe_emergence.run_folder import STAGES

ORPHAN_SECONDS = 20.0
SUITE = """
question = "Does a suite outlive its processes?"
seeds = [0]
preset = "demo"
test_modules = ["moe"]
[changes]
"data.split_seed" = 0
"data.data" = "texts"
"data.cache_dir" = "cache"
"data.block_size" = 16
"data.vocab_size" = 300
"data.token_types" = ["code=python", "math=math", "prose=words"]
"model.n_layer" = 2
"model.n_embd" = 16
"model.n_head" = 2
"model.moe_layers" = [1]
"model.num_experts" = 4
"optim.max_steps" = 3
"optim.batch_size" = 4
"optim.compare_dense" = false
"optim.compare_null" = false
"monitor.eval_every" = 2
"monitor.eval_blocks" = 4
"monitor.save_every" = 1
"monitor.log_router_every" = 1
"monitor.track" = "none"
[base.changes]
"optim.max_steps" = 2
[[variants]]
name = "dense"
changes = { "model.moe_layers" = [] }
[[variants]]
name = "moe"
like = "dense"
compare_with = "dense"
changes = { "model.moe_layers" = [1] }
"""


@dataclass(frozen=True)
class Scenario:
    """A command that is killed."""

    name: str
    module: str
    """Of the package, that has `main`."""
    flags: tuple[str, ...]
    phases: dict[str, str]
    """To probe for."""
    prepare: Callable[[Path], object]
    """Fills the folder that it works in, before the first life."""
    kill: Callable[[int, random.Random], tuple[str, list[psutil.Process]]] | None = None
    """How it is killed where it is several processes."""
    old_or_new: bool = False
    """Whether each file must be the old or the new one after every kill."""


@dataclass
class Tally:
    """What a storm has hit, and what it found."""

    kills: Counter[str] = field(default_factory=Counter)
    """By phase."""
    runs: int = 0
    lives: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def scenarios(out: Path) -> list[Scenario]:
    """All there are; what they share lies in `out`."""
    texts = out / "texts"
    write_texts(texts)
    suite = out / "suite.toml"
    suite.write_text(SUITE)
    finished = out / "finished"

    def with_texts(folder: Path) -> None:
        shutil.copytree(texts, folder / "texts")

    def with_run(folder: Path) -> None:
        if not finished.exists():
            finished.mkdir()
            with_texts(finished)
            uninterrupted(train, finished, out / "notes-finished")
            old = ("runs/tiny", "--max-tokens", "800", *_ANALYSIS)
            before = replace(train, module="moe_emergence.analyze", flags=old, phases={})
            uninterrupted(before, finished, out / "notes-finished")
        shutil.copytree(finished, folder, dirs_exist_ok=True)

    train = Scenario("train", "moe_emergence.train", _train_flags(), TRAIN_PHASES, with_texts)
    run_suite = ("run", str(suite), "--out", "suite", "--jobs", "2", "--device", "cpu")
    analysis = ("runs/tiny", *_ANALYSIS)
    return [
        train,
        Scenario("suite", "moe_emergence.suite", run_suite, WORKER_PHASES, with_texts, kill_some),
        Scenario(
            "analyze", "moe_emergence.analyze", analysis, ANALYZE_PHASES, with_run, old_or_new=True
        ),
        Scenario("verify", "moe_emergence.verify", _VERIFY, {}, lambda folder: None),
    ]


_ANALYSIS = ("--permutations", "19", "--knockout-tokens", "64", "--device", "cpu")
_VERIFY = (
    *("--json", "certificate.json", "--device", "cpu", "--cases", "1", "--dtype", "fp32"),
    *("--activation", "swiglu"),
)


def _train_flags() -> tuple[str, ...]:
    config = tiny(Path("texts"), Path("cache"), Path())
    optim = replace(
        config.optim, pretrain_steps=2, max_steps=4, compare_dense=True, compare_null=True
    )
    monitor = replace(config.monitor, eval_every=2, save_every=1, keep_last_k=2)
    return tuple(flags_of(replace(config, resume="auto", optim=optim, monitor=monitor)))


def kill_some(pid: int, rng: random.Random) -> tuple[str, list[psutil.Process]]:
    """Kill a suite, one of its workers, or all of them; who, and the workers left behind."""
    suite = psutil.Process(pid)
    try:
        workers = suite.children()
    except psutil.NoSuchProcess:
        return "nobody", []
    who = rng.choice(["suite", "worker", "all"] if workers else ["suite"])
    struck = {"suite": [suite], "worker": [rng.choice(workers)] if workers else []}
    for process in struck.get(who, [suite, *workers]):
        _kill(process)
    return who, workers if who == "suite" else []


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def storm(scenario: Scenario, kills: int, seed: int, out: Path) -> Iterator[Tally]:
    """Kill until `kills` have hit; folders of what went wrong are kept. Tells after every run."""
    rng, tally = random.Random(f"{scenario.name} {seed}"), Tally()
    reference, notes = out / scenario.name / "reference", out / scenario.name / "notes"
    reference.mkdir(parents=True)
    notes.mkdir()
    scenario.prepare(reference)
    before = contents(reference)
    uninterrupted(scenario, reference, notes)
    uncut = Uncut(before, contents(reference), operations(notes), seconds(notes))
    started = time.monotonic()
    while sum(tally.kills.values()) < kills:
        folder = out / scenario.name / f"run-{tally.runs}"
        folder.mkdir()
        scenario.prepare(folder)
        shutil.rmtree(notes)
        notes.mkdir()
        wrong = _one_run(scenario, folder, notes, uncut, rng, tally, kills)
        tally.runs += 1
        tally.failures += [f"{folder.name}: {line}" for line in wrong]
        if wrong:
            shutil.copytree(notes, folder / "notes")
        else:
            shutil.rmtree(folder)
        tally.seconds = time.monotonic() - started
        yield tally


@dataclass(frozen=True)
class Uncut:
    """What a command does that nobody kills."""

    before: dict[str, Any]
    """What is in its folder when it begins."""
    after: dict[str, Any]
    """And when it has ended."""
    operations: dict[str, int]
    """On files, by phase."""
    seconds: float


def uninterrupted(scenario: Scenario, folder: Path, notes: Path) -> None:
    """One life, to its end."""
    notes.mkdir(exist_ok=True)
    ended = Life(scenario.module, scenario.flags, folder, notes, scenario.phases).end()
    if ended.code != 0:
        raise RuntimeError((notes / "log.txt").read_text())


def _one_run(
    scenario: Scenario,
    folder: Path,
    notes: Path,
    uncut: Uncut,
    rng: random.Random,
    tally: Tally,
    kills: int,
) -> list[str]:
    """Lives until one ends by itself; what is wrong."""
    stage = 0
    while True:
        enough = sum(tally.kills.values()) >= kills
        aim = None
        way = "time" if scenario.kill else rng.choice(("time", "phase", "any", "any"))
        if not enough and way == "phase":
            phase = rng.choice(sorted(p for p in uncut.operations if _stage(p) >= stage))
            aim = Aim(phase, rng.randint(1, uncut.operations[phase]))
        elif not enough and way == "any":
            aim = Aim(None, rng.randint(1, sum(uncut.operations.values()) // 4))
        life = Life(scenario.module, scenario.flags, folder, notes, scenario.phases, aim)
        tally.lives += 1
        who, orphans = "", list[psutil.Process]()
        if not enough and aim is None and life.goes_on(rng.uniform(0, uncut.seconds)):
            if scenario.kill is None:
                life.kill()
            else:
                who, orphans = scenario.kill(life.pid, rng)
        ended = life.end()
        if ended.killed or who == "worker":
            tally.kills[who or ended.phase] += 1
            stage = max(stage, _stage(ended.phase))
        late = wait_for_orphans(orphans, ORPHAN_SECONDS)
        wrong = [f"process {pid} goes on without its parent" for pid in late]
        wrong += [f"a traceback in {log}" for log in tracebacks(folder, notes)]
        if scenario.old_or_new:
            wrong += neither(uncut, contents(folder))
        if wrong:
            return [f"after {who or ended.phase}, aim {aim}: {line}" for line in wrong]
        if ended.killed or who == "worker":
            continue
        if ended.code != 0:
            return [f"exit code {ended.code}: {(notes / 'log.txt').read_text()[-300:]}"]
        return differences(uncut.after, contents(folder))


def _stage(phase: str) -> int:
    """Which of a training's runs a phase is of: what lies behind is not done again."""
    role, colon, _ = phase.partition(": ")
    return list(STAGES).index(role) if colon else 0


def tracebacks(*folders: Path) -> list[str]:
    """Logs that hold one."""
    logs = [log for folder in folders for log in folder.rglob("*log*") if log.is_file()]
    return [str(log) for log in logs if "Traceback" in log.read_text(errors="replace")]


def neither(uncut: Uncut, found: dict[str, Any]) -> list[str]:
    """Files that are neither what was there before nor what is there in the end."""
    return [
        f"{name} is neither the old nor the new one"
        for name, content in found.items()
        if not Path(name).name.startswith(".")
        and content not in (uncut.before.get(name), uncut.after.get(name))
    ]


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What one folder lacks, has besides, or has otherwise."""
    lines = [f"{name} is missing" for name in expected.keys() - found.keys()]
    lines += [f"{name} is left over" for name in found.keys() - expected.keys()]
    both = sorted(expected.keys() & found.keys())
    return sorted(lines) + [f"{name} differs" for name in both if expected[name] != found[name]]


_TIMES = frozenset(
    {"tokens_per_sec", "wall_seconds", "train_seconds", "created", "files", "sha256"}
)


def contents(folder: Path) -> dict[str, Any]:
    """Every file by name, with what of it does not depend on the time of day.

    Hidden files in a cache are left out: others may be at work there, so what a killed process left
    stays for a day.
    """
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {
        name: _content(path)
        for name, path in names.items()
        if not (name.startswith("cache/") and "/." in name)
    }


def _content(path: Path) -> Any:
    if path.suffix == ".log":
        return "a log"
    content = path.read_bytes()
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in content.decode().splitlines()]
            return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]
        if path.suffix == ".json":
            return _timeless(json.loads(content))
    except ValueError as error:
        return f"{path} cannot be read: {error}"
    if path.suffix == ".pt":
        return _hashed(torch.load(path, weights_only=True))
    if path.suffix == ".html":
        content = re.sub(rb"20\d\d-\d\d-\d\dT[\d:+]+", b"", content)
    return sha256(content).hexdigest()


def _hashed(values: Any) -> Any:
    """Tensors by their bits; pickle writes equal things in more than one way."""
    if isinstance(values, torch.Tensor):
        return str(values.dtype), values.shape, sha256(values.numpy().tobytes()).hexdigest()
    if isinstance(values, dict):
        return {k: _hashed(v) for k, v in values.items()}
    return [_hashed(v) for v in values] if isinstance(values, list | tuple) else values


def _timeless(values: Any) -> Any:
    if isinstance(values, dict):
        return {k: _timeless(v) for k, v in values.items() if k not in _TIMES}
    return [_timeless(value) for value in values] if isinstance(values, list) else values


SHARES = {"train": 0.8, "suite": 0.12, "analyze": 0.06, "verify": 0.02}
"""Of the kills."""


def table(tallies: dict[str, Tally]) -> str:
    """What was hit, as Markdown."""
    lines = ["| command | killed while | kills |", "|---|---|---|"]
    for name, tally in tallies.items():
        lines += [f"| {name} | {phase} | {n} |" for phase, n in sorted(tally.kills.items())]
    lines += ["", "| command | kills | runs | lives | seconds | failures |", "|" + "---|" * 6]
    for name, tally in tallies.items():
        row = (name, tally.kills.total(), tally.runs, tally.lives, round(tally.seconds))
        lines.append(f"| {' | '.join(map(str, row))} | {len(tally.failures)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--only", choices=tuple(SHARES), nargs="+", default=tuple(SHARES))
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    share = sum(SHARES[name] for name in options.only)
    tallies: dict[str, Tally] = {}
    for scenario in scenarios(out):
        if scenario.name in options.only:
            kills = round(options.kills * SHARES[scenario.name] / share)
            for tally in storm(scenario, kills, options.seed, out):
                tallies[scenario.name] = tally
                found = {name: vars(tally) for name, tally in tallies.items()}
                (out / "storm.json").write_text(json.dumps(found, indent=2) + "\n")
    print("\n".join(line for tally in tallies.values() for line in tally.failures))
    print(table(tallies))
    return 1 if any(tally.failures for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

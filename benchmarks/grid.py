"""The whole grid as one command, most valuable groups first: `python -m benchmarks.grid --out DIR`.

Needs neither pytest nor matplotlib. `grid.json` is whole on disk after every measured phase, so a
run that is cut short keeps what it has; `--resume` goes on with the groups that are missing.
"""

import argparse
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import add_common, common_environment, device_of, start_logging
from benchmarks.contestants import Absent, Contestant, Entry
from benchmarks.layer import DeviceLost, measure_layer
from benchmarks.peers import ENTRIES
from benchmarks.results import Document, Journal, read_document
from benchmarks.scaling import measure_scaling
from benchmarks.setups import SETUPS
from benchmarks.tables import markdown
from benchmarks.training_step import measure_training
from benchmarks.workloads import SHAPES, Case, Problem, Routing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One group: what it is called in the results, and the function that measures it."""

    suite: str
    group: str
    measure: Callable[..., Any]
    """Takes `on_rows`, which receives the rows."""


def layer_cases(device: str, dtypes: Sequence[str]) -> list[Case]:
    """Cases of the layer suite in order of value.

    Every shape in balanced routing first, then SwiGLU in the first dtype (where more peers take
    part), then the skewed routings, then SwiGLU in the other dtypes.
    """
    shapes = [s for n, s in SHAPES.items() if n != "tiny" and (device == "cuda" or not s.gpu_only)]
    skewed: tuple[Routing, ...] = ("zipf", "collapsed")
    balanced = [Case(s, "balanced", d) for d in dtypes for s in shapes]
    gated = [Case(s, "balanced", d, "swiglu") for d in dtypes for s in shapes]
    others = [Case(s, r, d) for d in dtypes for r in skewed for s in shapes]
    return [*balanced, *gated[: len(shapes)], *others, *gated[len(shapes) :]]


LARGE_ON_CPU = ("predecessor", "dense", "fused", "fused-micro")
"""Models of GPT-2 small in training: what minutes and 20 GB of memory suffice for."""


def tasks(
    device: str,
    dtypes: Sequence[str],
    budget_s: float,
    entries: Sequence[Entry],
    *,
    tiny: bool = False,
    large: bool = False,
) -> list[Task]:
    """Everything to measure, the most valuable first."""
    cases = [Case(SHAPES["tiny"], "zipf", d) for d in dtypes]
    names: tuple[str, ...] = ("tiny",)
    if not tiny:
        cases = layer_cases(device, dtypes)
        names = (
            ("gpt2-small", "gpt2-small-batch16", "gpt2-small-top2")
            if device == "cuda"
            else ("demo",)
        )
    layer = [
        Task(
            "layer",
            case.name,
            functools.partial(measure_layer, case, device, budget_s=budget_s, entries=entries),
        )
        for case in cases
    ]
    training = [
        Task(
            "training",
            f"{name}/{dtype}",
            functools.partial(measure_training, SETUPS[name], device, dtype, budget_s=2 * budget_s),
        )
        for name in names
        for dtype in dtypes
        if dtype != "fp16"
    ]
    if large and device == "cpu":
        training += [
            Task(
                "training",
                f"gpt2-small/{dtype}",
                functools.partial(
                    measure_training,
                    SETUPS["gpt2-small"],
                    device,
                    dtype,
                    budget_s=0.0,
                    models=LARGE_ON_CPU,
                ),
            )
            for dtype in dtypes
            if dtype != "fp16"
        ]
    scaling = Task(
        "scaling",
        f"tokens/{dtypes[0]}",
        functools.partial(measure_scaling, device, dtypes[0], budget_s=budget_s / 2, tiny=tiny),
    )
    first = 5 if device == "cuda" else 2
    return [*layer[:first], *training, *layer[first : 3 * first], scaling, *layer[3 * first :]]


def run(todo: Iterable[Task], journal: Journal, deadline: float) -> bool:
    """Measure what the journal lacks until the deadline; whether no group failed.

    Raises:
        DeviceLost: when a contestant left the device unusable; its group is not in the journal.
    """
    sound = True
    done = {(row.suite, row.group) for row in journal.rows}
    for task in todo:
        if (task.suite, task.group) in done:
            continue
        if time.monotonic() > deadline:
            logger.warning("out of time before %s %s", task.suite, task.group)
            break
        started = time.monotonic()
        try:
            task.measure(on_rows=journal.add)
        except DeviceLost:
            journal.drop(task.suite, task.group)
            raise
        # out of memory, for instance: smaller groups may still fit
        except Exception:
            logger.exception("%s %s failed", task.suite, task.group)
            sound = False
        logger.info("%s %s: %.1f s", task.suite, task.group, time.monotonic() - started)
    return sound


def without(entries: Sequence[Entry], excluded: Sequence[str]) -> tuple[Entry, ...]:
    """`entries`, those in `excluded` replaced by one that only says so."""

    def refuse(problem: Problem) -> Contestant:
        raise Absent("error", "left the device unusable earlier in this run")

    return tuple(Entry(e.name, refuse, e.about) if e.name in excluded else e for e in entries)


def start_again(error: DeviceLost, arguments: Sequence[str], deadline: float) -> None:
    """Replace this process: CUDA does not recover within one."""
    logger.warning("%s left the device unusable; going on without it", error.contestant)
    left = max(1, round(deadline - time.monotonic()))
    flags = [*arguments, "--resume", "--exclude", error.contestant, "--time-limit", str(left)]
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.grid", *flags])


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grid", description=__doc__)
    add_common(parser)
    parser.add_argument("--resume", action="store_true", help="keep what grid.json holds")
    parser.add_argument("--suite", choices=("layer", "training", "scaling"), help="only this one")
    parser.add_argument(
        "--large", action="store_true", help="train GPT-2 small on a CPU too: minutes, 20 GB"
    )
    parser.add_argument("--exclude", action="append", default=[], help="a contestant to leave out")
    options = parser.parse_args(arguments)
    start_logging()
    device = device_of(options.device)
    deadline = time.monotonic() + options.time_limit
    dtypes = options.dtype or (["bf16", "fp32"] if device == "cuda" else ["fp32", "bf16"])
    path = Path(options.out) / "grid.json"
    before = read_document(path).rows if options.resume and path.exists() else ()
    journal = Journal(path, common_environment(device), before)
    entries = without(ENTRIES, options.exclude)
    size = {"tiny": options.tiny, "large": options.large}
    todo = tasks(device, dtypes, options.budget, entries, **size)
    todo = [task for task in todo if options.suite in (None, task.suite)]
    sound = False
    try:
        sound = run(todo, journal, deadline)
    except DeviceLost as error:
        start_again(error, arguments, deadline)
    table = path.with_suffix(".md")
    table.write_text(markdown([Document(journal.environment, journal.rows)]), encoding="utf-8")
    logger.info("%d rows in %s, tables in %s", len(journal.rows), path, table)
    if not sound:
        sys.exit("a group failed, see the log above")


if __name__ == "__main__":
    main()

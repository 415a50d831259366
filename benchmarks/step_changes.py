"""What each change to the training step is worth: `python -m benchmarks.step_changes --out DIR`.

A dense model trains with all of them, and with all but one, each in a process of its own and taking
turns; the ratio is that of the step times.
"""

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from benchmarks.command import add_common, common_environment, device_of, start_logging
from benchmarks.layer import timing_fields
from benchmarks.results import Document, Journal, Row
from benchmarks.setups import SETUPS, Setup
from benchmarks.steps import Bench, Change
from benchmarks.tables import markdown
from benchmarks.workers import Worker, take_turns

logger = logging.getLogger(__name__)

ALL = "all changes"


def measure_changes(setup: Setup, device: str, precision: str, *, budget_s: float) -> list[Row]:
    """One row with every change and one without each; speed-ups are over the row with all."""
    names = {ALL: ()} | {f"without {change}": (change,) for change in get_args(Change)}
    group = f"changes/{setup.name}/{precision}"
    parameters = {**vars(setup), "dtype": precision}
    with contextlib.ExitStack() as stack:
        works = {
            name: stack.enter_context(
                Worker(device, Bench, setup, device, precision, "dense", without)
            )
            for name, without in names.items()
        }
        peaks = {}
        for name, worker in works.items():
            for _ in range(2):
                worker.ask("step", name)
            peaks[name] = worker.ask("peak")
        samples = take_turns(works, budget_s)
    blank = Row("training", group, "step", "", "floor", parameters=parameters)
    return [
        replace(
            blank,
            contestant=name,
            **timing_fields(name, samples, (), ALL),
            tokens_per_s=setup.tokens / timed.median,
            peak_bytes=peaks[name],
        )
        for name, timed in samples.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_changes", description=__doc__)
    add_common(parser)
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    start_logging()
    device = device_of(options.device)
    names = ["tiny"] if options.tiny else ["demo", "gpt2-small-micro-batch"]
    path = Path(options.out) / "step_changes.json"
    journal = Journal(path, common_environment(device))
    for name in names:
        for dtype in options.dtype or ["fp32", "bf16"]:
            rows = measure_changes(SETUPS[name], device, dtype, budget_s=options.budget)
            journal.add(rows)
            logger.info("%s %s done", name, dtype)
    table = path.with_suffix(".md")
    table.write_text(markdown([Document(journal.environment, journal.rows)]), encoding="utf-8")
    logger.info("%d rows in %s, tables in %s", len(journal.rows), path, table)


if __name__ == "__main__":
    main()

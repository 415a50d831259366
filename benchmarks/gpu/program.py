"""Stages in order of worth, each in a process of its own, with every row on disk as it is found.

A stage is a generator of rows. One that raises, or takes the device with it, is recorded with its
traceback, and the next one runs.
"""

import dataclasses
import json
import logging
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emergence_kernels.processes import warm_processes
from moe_emergence.disk import write_text

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[2]

Fields = dict[str, Any]
"""What was measured, JSON-ready."""


class OutOfTime(Exception):
    """A stage stops at its deadline with something left to measure."""


@dataclass(frozen=True)
class Setting:
    """Where and how a stage measures."""

    device: str
    """cuda or cpu; on a CPU kernels run in Triton's interpreter."""
    tiny: bool
    """Toy sizes, which measure nothing: the rehearsal's."""
    out: str
    """Folder for what is no row, such as logs."""
    workers: int
    """Processes that may compile or test at once."""
    deadline: float
    """`time.time()` at which the stage has to be done."""


@dataclass(frozen=True)
class Stage:
    """One part of the program."""

    name: str
    measure: Callable[[Setting], Iterator[Fields]]
    """Importable by name; raises `OutOfTime` where it leaves something out."""
    seconds: float
    """What it takes on an H100."""


@dataclass
class Journal:
    """`gpu.json`: environment, and of every stage its state, seconds, rows and error."""

    path: Path
    environment: Fields
    stages: dict[str, Fields] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, environment: Fields) -> "Journal":
        """The journal at `path` if it is of the same commit and device, else a new one."""
        journal = cls(path, environment)
        if path.exists():
            before = read_journal(path)
            same = ("commit", "device_name")
            if all(before["environment"].get(k) == environment.get(k) for k in same):
                journal.stages = before["stages"]
        return journal

    def write(self) -> None:
        """Such that a reader always finds a whole file."""
        content = {"environment": self.environment, "stages": self.stages}
        write_text(self.path, json.dumps(content, indent=1, default=str) + "\n")


def read_journal(path: Path) -> Fields:
    """What a `Journal` wrote.

    Raises:
        ValueError: for anything else.
    """
    try:
        content: Fields = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(content[key], dict) for key in ("environment", "stages")):
            return content
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not what `benchmarks.gpu run` writes ({error})") from error
    raise ValueError(f"{path}: not what `benchmarks.gpu run` writes")


def run_stages(stages: Sequence[Stage], journal: Journal, setting: Setting) -> bool:
    """Run what the journal lacks until the setting's deadline; whether every stage was completed.

    A stage that cannot finish in the time left is not begun.
    """
    for stage in stages:
        if journal.stages.get(stage.name, {}).get("state") == "complete":
            logger.info("%s: complete already", stage.name)
            continue
        left = setting.deadline - time.time()
        if left < stage.seconds / 2:
            journal.stages[stage.name] = {"state": "no time left", "rows": []}
            journal.write()
            logger.warning("%s: %.0f s left, it takes %.0f", stage.name, left, stage.seconds)
            continue
        limit = min(left, 2 * stage.seconds)
        _run_stage(stage, journal, dataclasses.replace(setting, deadline=time.time() + limit))
    return all(journal.stages[stage.name]["state"] == "complete" for stage in stages)


def _run_stage(stage: Stage, journal: Journal, setting: Setting) -> None:
    context = warm_processes("torch", "benchmarks.gpu.stages")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(stage, setting, there))
    started = time.time()
    record: Fields = {"state": "running", "seconds": 0.0, "rows": []}
    journal.stages[stage.name] = record
    process.start()
    there.close()
    while record["state"] == "running":
        # a stage may stop by itself at its deadline, and say so
        if not here.poll(max(setting.deadline + 5 - time.time(), 0.1)):
            record["state"] = "out of time"
            break
        try:
            kind, what = here.recv()
        except EOFError:
            process.join()
            record.update(state="died", error=f"exit code {process.exitcode}, without a word")
            break
        if kind == "row":
            record["rows"].append(what)
            logger.info("%s %s", stage.name, what)
        else:
            record.update(state=kind, error=what)
        record["seconds"] = round(time.time() - started, 1)
        journal.write()
    process.terminate()
    process.join(5)
    if process.is_alive():
        process.kill()
        process.join()
    record["seconds"] = round(time.time() - started, 1)
    journal.write()
    why = record.get("error") or ""
    logger.info("%s: %s after %.1f s %s", stage.name, record["state"], record["seconds"], why)


def _measure(stage: Stage, setting: Setting, parent: Any) -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        for row in stage.measure(setting):
            parent.send(("row", _without_this_machine(row)))
        parent.send(("complete", None))
    except OutOfTime:
        parent.send(("out of time", None))
    except BaseException:  # noqa: BLE001 - whatever it is, it goes into the record
        parent.send(("failed", _without_this_machine(traceback.format_exc())[-4000:]))
    parent.close()


def _without_this_machine(value: Any) -> Any:
    """Paths in texts from the repository, or from the installed package, on."""
    if isinstance(value, Mapping):
        return {key: _without_this_machine(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_this_machine(v) for v in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"[^\s\"']*/site-packages/", "", value.replace(f"{REPOSITORY}{os.sep}", ""))

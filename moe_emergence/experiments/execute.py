"""Run what a plan lacks, each run in a process of its own, some at a time.

What is complete is skipped, what was cut off goes on from its newest checkpoint, and a run that
fails costs only itself and, if it is a base, the runs that start from it.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from moe_emergence.disk import make_folder, named, remove_file, remove_folder
from moe_emergence.experiments.description import BASE
from moe_emergence.experiments.live import LiveTable
from moe_emergence.experiments.plan import PlannedRun
from moe_emergence.interrupt import StopRequest, finishing, was_interrupted
from moe_emergence.run_folder import read_config, read_json, write_json
from moe_emergence.settings import to_dict
from moe_emergence.training.resume import check_same_run

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 20.0


@dataclass
class RunState:
    """A planned run and how far it has come: complete, waiting, running, failed or stopped."""

    planned: PlannedRun
    state: str = "waiting"
    note: str = ""
    process: subprocess.Popen[bytes] | None = None


@dataclass(frozen=True)
class Execution:
    """How runs are executed; no part of what they compute."""

    root: Path
    jobs: int = 1
    threads: int = 0
    """Of each process on a CPU; 0 leaves it to torch."""
    keep_models: bool = False
    command: tuple[str, ...] = field(
        default=(sys.executable, "-m", "moe_emergence.experiments.worker")
    )


def is_complete(planned: PlannedRun) -> bool:
    """Whether a run has ended for good and left all that the report needs.

    Raises:
        ValueError: when its folder holds a run with other settings.
    """
    run = planned.run
    if run.config.exists():
        saved = read_config(run.config)
        if planned.needs_base:
            # it is the suite's own; a suite's folder may be moved, and be named from elsewhere
            model = replace(saved.model, base=planned.config.model.base)
            saved = replace(saved, model=model)
        try:
            check_same_run(saved, planned.config)
        except ValueError as error:
            raise ValueError(f"{run.root}: {error}, or another --out") from error
    if not run.summary.exists():
        return False
    if read_json(run.summary).get("status") not in ("completed", "collapsed"):
        return False
    if planned.variant == BASE:
        return run.final_model.is_dir()
    wanted = [run.routing] if planned.config.model.moe_layers else []
    wanted += [run.modules] if planned.test_modules else []
    return all(path.exists() for path in wanted)


def execute(runs: Sequence[PlannedRun], execution: Execution) -> tuple[list[RunState], int]:
    """Do what is missing; returns the state of every run, and the signal that stopped it, or 0.

    A signal stops the running processes, which save a checkpoint; the next call goes on.

    Raises:
        ValueError: when a folder holds a run with other settings; nothing has begun then.
    """
    states = [RunState(p, "complete" if is_complete(p) else "waiting") for p in runs]
    for state in states:
        plan, _ = _paths(state.planned, execution.root)
        if state.state == "complete" and plan.exists():  # who was to tidy up was killed
            _tidy(state.planned, execution)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        table = stack.enter_context(LiveTable([state.planned for state in states]))
        try:
            while _advance(states, execution, stopping=stop.number > 0):
                table.show([(s.state, s.note) for s in states])
                time.sleep(_POLL_SECONDS)
        finally:
            for state in states:
                if state.process is not None:
                    _end(state.process)
        table.show([(s.state, s.note) for s in states])
    return states, stop.number


def _advance(states: Sequence[RunState], execution: Execution, *, stopping: bool) -> bool:
    """Look after the running processes and start what can start; whether anything is left."""
    for state in states:
        if state.process is not None:
            _look_after(state, execution, stopping=stopping)
    running = sum(state.process is not None for state in states)
    if stopping:
        return running > 0
    for state in states:
        if running >= execution.jobs:
            break
        if state.state == "waiting" and _may_start(state, states):
            _start(state, execution)
            running += 1
    return running > 0


def _may_start(state: RunState, states: Sequence[RunState]) -> bool:
    """Whether the base is there; a run whose base failed is failed too."""
    if not state.planned.needs_base:
        return True
    base = next(
        s for s in states if s.planned.variant == BASE and s.planned.seed == state.planned.seed
    )
    if base.state == "failed":
        state.state, state.note = "failed", "its base failed"
        logger.error("%s: its base failed", state.planned.name)
    return base.state == "complete"


def _paths(planned: PlannedRun, root: Path) -> tuple[Path, Path]:
    """Where the plan and the log of a run are."""
    name = planned.name.replace("/", "-")
    return root / "plans" / f"{name}.json", root / "logs" / f"{name}.log"


def _start(state: RunState, execution: Execution) -> None:
    plan, log = _paths(state.planned, execution.root)
    write_json(plan, to_dict(state.planned.config))
    flags = ["--threads", str(execution.threads)] if execution.threads else []
    flags += ["--test-modules"] if state.planned.test_modules else []
    # no signal comes between a process and what knows of it
    with _opened(log) as file, finishing():
        state.process = _spawn([*execution.command, str(plan), *flags], file)
    state.state, state.note = "running", ""
    logger.info("%s begins", state.planned.name)


def _opened(log: Path) -> IO[bytes]:
    make_folder(log.parent)
    with named(log):
        return log.open("ab")


def _spawn(command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """A process of a session of its own: Ctrl-C reaches this process, which ends it properly."""
    return subprocess.Popen(
        [*command, "--parent", str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def _look_after(state: RunState, execution: Execution, *, stopping: bool) -> None:
    process = state.process
    assert process is not None
    if stopping and state.state == "running":
        process.terminate()
        state.state = "stopping"
    code = process.poll()
    if code is None:
        return
    state.process = None
    if code == 0 and is_complete(state.planned):
        _tidy(state.planned, execution)
        state.state = "complete"
        logger.info("%s is complete", state.planned.name)
    elif stopping or was_interrupted(code):
        state.state = "stopped"
    else:
        _, log = _paths(state.planned, execution.root)
        state.state, state.note = "failed", _last_line(log) or f"exit code {code}"
        logger.error(
            "%s failed with exit code %d (%s); see %s", state.planned.name, code, state.note, log
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a process at once, or kill it."""
    process.terminate()
    try:
        process.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tidy(planned: PlannedRun, execution: Execution) -> None:
    """Free the disk of what is big in a complete run, as a suite has a hundred, and last delete its
    plan: while that is there, the run is not done with."""
    run = planned.run
    if not execution.keep_models:
        # variants start from the final model of their base
        final = () if planned.variant == BASE else (run.final_model,)
        for folder in filter(Path.is_dir, (run.checkpoints, run.best_model, *final)):
            remove_folder(folder)
    remove_file(_paths(planned, execution.root)[0])


def _last_line(log: Path) -> str:
    with named(log, "read"):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:200] if lines else ""

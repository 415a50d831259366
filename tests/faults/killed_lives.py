"""Lives of a command: processes forked from a warm server that are killed with SIGKILL.

What a life is doing when it dies is known from a probe: the harness wraps some functions in the
child, and the name of the one that is running stands in a file.
"""

import gc
import importlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
from warm_commands import IMPORTS

from emergence_kernels.processes import warm_processes
from moe_emergence.errors import exit_code

ELSEWHERE = "elsewhere"
_WIDTH = 64
_PATIENCE_SECONDS = 300
_OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")

TRAIN_PHASES = {
    "training.experiment:find_checkpoint": "resume",
    "training.experiment:load_trained_model": "resume",
    "training.experiment:_prepare": "data",
    "training.experiment:_start_folder": "beginning",
    "training.trainer:Trainer._restore": "resume",
    "training.trainer:Trainer._train_step": "step",
    "training.trainer:Trainer._evaluate": "evaluation",
    "training.trainer:Trainer._save_checkpoint": "checkpoint",
    "training.trainer:Trainer._write_summary": "summary",
    "run_folder:MetricsWriter.append": "metrics",
    "run_folder:MetricsWriter.keep_up_to": "metrics",
    "train.work:_report": "report",
}
"""What a life of a training is doing, by the function that does it."""
WORKER_PHASES = TRAIN_PHASES | {
    "experiments.worker:record_final_routing": "routing",
    "experiments.worker:test_final_modules": "modules",
}
ANALYZE_PHASES = {
    "analyze.work:write_tables": "tables",
    "analyze.work:write_json": "json",
    "analyze.work:write_figures": "figures",
    "analyze.work:write_report": "page",
}
_MODELS = {"best-model": "best model", "final-model": "final model"}


@dataclass(frozen=True)
class Aim:
    """A life that kills itself before the `operation`-th file operation (from 1) of a phase, or
    with None of all there are."""

    phase: str | None
    operation: int


class Probe:
    """Keeps the name of the phase in a file, counts file operations by phase, and meets the aim."""

    def __init__(self, path: Path, inside: Path, aim: Aim | None) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._inside, self._aim = f"{inside.resolve()}{os.sep}", aim
        self.stage, self.phases = "", [ELSEWHERE]
        self.operations: Counter[str] = Counter()
        self._show()
        sys.addaudithook(self._on_event)

    @property
    def phase(self) -> str:
        return self.phases[-1]

    def _show(self) -> None:
        os.pwrite(self._handle, self.phase.ljust(_WIDTH).encode(), 0)

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        by_name = bool(arguments) and isinstance(arguments[0], str | bytes | os.PathLike)
        if not by_name or event not in ("open", *_OPERATIONS):
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if path.startswith(self._inside):
            self.operations[self.phase] += 1
            met = Aim(self.phase, self.operations[self.phase]), Aim(None, self.operations.total())
            if self._aim in met:
                os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        self.phases.append(f"{self.stage}{name}")
        self._show()
        try:
            yield
        finally:
            self.phases.pop()
            self._show()

    def wrap(self, phases: Mapping[str, str]) -> None:
        """Have the functions named, `module:function` of the package, say what they are doing."""
        for where, name in phases.items():
            self._replace(where, lambda function, name=name: self._said(function, lambda *_: name))
        self._replace(
            "training.trainer:Trainer._save_model",
            lambda function: self._said(function, lambda _, folder: _MODELS[folder.name]),
        )
        self._replace("training.experiment:_run_stage", self._in_stage)

    def _replace(self, where: str, change: Callable[[Any], Any]) -> None:
        module, _, path = where.partition(":")
        owner: Any = importlib.import_module(f"moe_emergence.{module}")
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, name, change(getattr(owner, name)))

    def _said(self, function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        @wraps(function)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            with self.during(name(*arguments)):
                return function(*arguments, **named)

        return wrapped

    def _in_stage(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapped(stage: Any, *arguments: Any) -> Any:
            self.stage = f"{stage.role}: "
            try:
                with self.during("between"):
                    return function(stage, *arguments)
            finally:
                self.stage = ""

        return wrapped


@dataclass(frozen=True)
class Ended:
    """How a life ended."""

    code: int
    phase: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Life:
    """`main(flags)` of a module of the package, in a process of its own, in the folder `where`.

    Args:
        module: that has `main`.
        flags: of the command.
        where: its working folder.
        notes: folder for log, probe and counts, outside of `where`.
        phases: to probe for.
        aim: where it kills itself, if it does.
    """

    def __init__(
        self,
        module: str,
        flags: Sequence[str],
        where: Path,
        notes: Path,
        phases: Mapping[str, str],
        aim: Aim | None = None,
    ) -> None:
        self._notes = notes
        context = warm_processes(*IMPORTS, "moe_emergence.suite.work", "killed_lives")
        self._process: BaseProcess = context.Process(
            target=_live, args=(module, [*flags], where, notes, dict(phases), aim)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def goes_on(self, seconds: float) -> bool:
        """Whether it lives for so many seconds more."""
        self._process.join(seconds)
        return self._process.exitcode is None

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> Ended:
        """How it ended, which is waited for."""
        self._process.join(_PATIENCE_SECONDS)
        code = self._process.exitcode
        if code is None:
            raise TimeoutError((self._notes / "log.txt").read_text())
        probe = self._notes / "probe"
        phase = probe.read_text().strip() if probe.exists() else ""
        return Ended(code, phase or ELSEWHERE)


def seconds(notes: Path) -> float:
    """How long that life took, without the start of the server before the first one."""
    return float((notes / "seconds").read_text())


def operations(notes: Path) -> dict[str, int]:
    """File operations by phase in the life that last ended by itself."""
    lines = (notes / "operations").read_text().splitlines()
    return {name: int(count) for count, _, name in (line.partition(" ") for line in lines)}


def wait_for_orphans(processes: Sequence[psutil.Process], seconds: float) -> list[int]:
    """Those still alive after so many seconds."""
    until = time.monotonic() + seconds
    while (alive := [p.pid for p in processes if _is_alive(p)]) and time.monotonic() < until:
        time.sleep(0.05)
    return alive


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _live(
    module: str,
    flags: list[str],
    where: Path,
    notes: Path,
    phases: dict[str, str],
    aim: Aim | None,
) -> None:
    started = time.monotonic()
    gc.freeze()  # the server's imports are no garbage to search, which every stage does
    os.chdir(where)
    _log_to(notes / "log.txt")
    torch.set_num_threads(1)
    probe = Probe(notes / "probe", where, aim)
    probe.wrap(phases)
    if module == "moe_emergence.suite":
        _fork_workers(notes)
    code = exit_code(importlib.import_module(module).main, flags)
    counts = "".join(f"{count} {name}\n" for name, count in probe.operations.items())
    (notes / "operations").write_text(counts)
    (notes / "seconds").write_text(str(time.monotonic() - started))
    sys.exit(code)


def _log_to(path: Path) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(handle, number)


def _fork_workers(notes: Path) -> None:
    """Workers of a suite start with this process' imports, as its children."""
    from moe_emergence.experiments import execute, worker

    class Forked:
        def __init__(self, command: Sequence[str], log: Any) -> None:
            path = Path(log.name).resolve()
            self._code: int | None = None
            self.pid = os.fork()
            if self.pid == 0:
                code = 70
                try:
                    os.setsid()
                    _log_to(path)
                    code = exit_code(worker.main, [*command[3:], "--parent", str(os.getppid())])
                    sys.stdout.flush()
                    sys.stderr.flush()
                finally:
                    os._exit(code)

        def poll(self) -> int | None:
            if self._code is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._code = os.waitstatus_to_exitcode(status) if pid else None
            return self._code

        def wait(self) -> int:
            while (code := self.poll()) is None:
                time.sleep(0.01)
            return code

        def terminate(self) -> None:
            if self.poll() is None:
                os.kill(self.pid, signal.SIGTERM)

    execute._spawn = Forked
    execute._POLL_SECONDS = 0.02

"""Signals that end a command: at once, or after the step that is being done.

Python calls a handler between two bytecodes of the main thread, wherever that is; so a handler
writes with `os.write` only, and what must not be cut in two stands in a block of `finishing`.
"""

import contextlib
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

# SLURM sends SIGUSR1 before it preempts, a terminal that is closed SIGHUP; Windows has neither
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
)
"""What asks a command to end."""

_AGAIN_SECONDS = 1.0
"""A launcher repeats what the terminal has sent already; a person takes longer."""

_SHOW_CURSOR = "\x1b[?25h"


class Interrupted(KeyboardInterrupt):
    """A signal ends the command at once; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


def interrupted_code(number: int) -> int:
    """The exit code of a command that a signal ended, as shells have it."""
    return 128 + number


def was_interrupted(code: int) -> bool:
    """Whether a process with this exit code, as `subprocess` has it, was ended by `SIGNALS`."""
    return code in [c for number in SIGNALS for c in (interrupted_code(number), -number)]


class _Handling:
    """Context manager that has the signals, but for those that are ignored, as under nohup.

    The same signal again, a second or more after the first, insists.
    """

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._previous[number] = before
                    signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        _leave_closed_terminal()
        now, is_first = time.monotonic(), not self._seen
        insists = number in self._seen and now - self._seen[number] >= _AGAIN_SECONDS
        self._seen.setdefault(number, now)
        if is_first or insists:
            self._answer(number, insists=insists)

    def _answer(self, number: int, *, insists: bool) -> None:
        raise NotImplementedError


class EndAtOnce(_Handling):
    """Context manager: a signal raises `Interrupted`; one that insists kills the process."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # the command has ended: nothing is left to tidy up while the interpreter winds down
        for number in self._previous:
            signal.signal(number, signal.SIG_DFL)

    def _answer(self, number: int, *, insists: bool) -> None:
        if insists:
            _kill(number)
        raise Interrupted(number)


class StopRequest(_Handling):
    """Context manager: a signal sets `number`; one that insists raises `Interrupted`."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        """Of the first signal; 0 while there was none."""
        self._raised = False

    def _answer(self, number: int, *, insists: bool) -> None:
        if not insists:
            self.number = number
            name = signal.Signals(number).name
            _say(f"{name}: stopping after this step, with a checkpoint; again to stop at once")
        elif self._raised:
            _kill(number)
        else:
            self._raised, self._seen = True, {number: time.monotonic()}
            raise Interrupted(number)


@contextmanager
def finishing() -> Iterator[None]:
    """Signals wait until the block is done: for renaming and tidying up, which take no time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    late: list[int] = []
    previous = {}
    try:
        for number in SIGNALS:
            before = signal.getsignal(number)
            if before not in (signal.SIG_IGN, None):
                previous[number] = before
                signal.signal(number, lambda number, frame: late.append(number))
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number in late:
            signal.raise_signal(number)


def leave_to_parent() -> None:
    """In a process of a pool: a signal to the whole group is its parent's to answer."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _say(line: str) -> None:
    """Write a line to stderr from within a handler, where its buffer may be in use."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def _kill(number: int) -> None:
    """End as SIGKILL would: files are whole or absent, and the next start tidies up."""
    show = _SHOW_CURSOR if os.isatty(2) else ""
    _say(f"{show}error: interrupted by {signal.Signals(number).name}, twice")
    os._exit(interrupted_code(number))


def _leave_closed_terminal() -> None:
    """What is written to a terminal that was closed would raise: it goes nowhere instead."""
    if sys.platform == "win32":
        return
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            is_device = stat.S_ISCHR(os.fstat(descriptor).st_mode)
            if is_device and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_RDWR)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)

"""Contestants in processes of their own, taking turns: each has its own memory and allocator.

A worker builds what it measures once and then answers requests over a pipe; between requests it
waits, so only one works at a time.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from benchmarks.footprint import resident_peak
from benchmarks.stopwatch import MAX_ROUNDS, MIN_ROUNDS, Samples, synchronize
from emergence_kernels.processes import warm_processes


class Measured(Protocol):
    """What a worker's process builds: any number of named works."""

    def look(self, name: str) -> Any:
        """Whatever is worth knowing of `name` before it runs; must be picklable."""

    def step(self, name: str) -> object:
        """One pass of `name`."""


@dataclass(frozen=True)
class WorkerError:
    """What went wrong in a worker; sent back in place of an answer."""

    text: str


class Worker:
    """A process that holds what `build(*arguments)` returned.

    Both must be importable by name. Ends with the `with` block.
    """

    def __init__(self, device: str, build: Callable[..., Measured], *arguments: object) -> None:
        context = warm_processes(__name__, build.__module__)
        self._pipe, end = context.Pipe()
        threads = torch.get_num_threads()
        self._process = context.Process(
            target=_serve, args=(end, threads, device, build, arguments), daemon=True
        )

    def __enter__(self) -> "Worker":
        self._process.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.join()

    def ask(self, request: str, name: str = "") -> Any:
        """The answer to `look`, `step` (seconds) or `peak` (bytes; None where nothing counts them).

        Raises:
            RuntimeError: with what was raised there, or when the process has died.
        """
        try:
            self._pipe.send((request, name))
            while not self._pipe.poll(1.0):
                if not self._process.is_alive():
                    raise EOFError
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise RuntimeError(f"its process ended ({self._process.exitcode})") from error
        if isinstance(answer, WorkerError):
            raise RuntimeError(answer.text)
        return answer


def take_turns(works: Mapping[str, Worker], budget_s: float) -> dict[str, Samples]:
    """Seconds of every name in its worker, once per round, for about `budget_s` seconds.

    Every work has run before. Each round starts with another name.
    """
    once_s = sum(worker.ask("step", name) for name, worker in works.items())
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget_s / max(once_s, 1e-6))))
    names: Sequence[str] = list(works)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for r in range(rounds):
        shift = r % max(len(names), 1)
        for name in (*names[shift:], *names[:shift]):
            seconds[name].append(works[name].ask("step", name))
    return {name: Samples(tuple(found)) for name, found in seconds.items()}


def _serve(
    pipe: Connection,
    threads: int,
    device: str,
    build: Callable[..., Measured],
    arguments: tuple[object, ...],
) -> None:
    torch.set_num_threads(threads)
    measured: Measured | None = None
    while True:
        try:
            request, name = pipe.recv()
        except EOFError:
            return
        try:
            # built on the first request, so that what fails there is answered too
            measured = build(*arguments) if measured is None else measured
            pipe.send(_answer(measured, request, name, device))
        except Exception as error:  # noqa: BLE001 - it becomes the answer
            pipe.send(WorkerError(f"{type(error).__name__}: {error}"))


def _answer(measured: Measured, request: str, name: str, device: str) -> Any:
    if request == "look":
        return measured.look(name)
    if request == "step":
        synchronize(device)
        start = time.perf_counter()
        measured.step(name)
        synchronize(device)
        return time.perf_counter() - start
    assert request == "peak"
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident_peak()

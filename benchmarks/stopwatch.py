"""Timing: contestants take turns, so that whatever slows the machine slows all of them."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from moe_emergence.cuda_graph import CudaCapture, NotCapturableError

Work = Callable[[], object]

L2_BYTES = 256 * 2**20
"""Written between two timed passes on CUDA; several times the L2 cache of any GPU so far."""
MAX_ROUNDS = 200
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Samples:
    """Seconds of one contestant, one entry per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the seconds."""
        return quartiles(self.seconds)

    def speedup_over(self, reference: "Samples") -> tuple[float, tuple[float, float]]:
        """Median and quartiles of the reference's time over this one's, round by round."""
        ratios = [r / s for r, s in zip(reference.seconds, self.seconds, strict=True)]
        return statistics.median(ratios), quartiles(ratios)


def quartiles(values: tuple[float, ...] | list[float]) -> tuple[float, float]:
    """First and third quartile; of a single value, that value twice."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def interleave(works: Mapping[str, Work], device: str, budget_s: float) -> dict[str, Samples]:
    """Time every work once per round, for about `budget_s` seconds (at least `MIN_ROUNDS` rounds).

    Each round has an order of its own, drawn at random (seeded), so that none always follows the
    same one. On CUDA a pass starts on an idle device whose L2 cache was overwritten: its time,
    between two events on the stream, is that of the device and of the launches it waits for.
    """
    once_s = sum(_warm_up(work, device) for work in works.values())
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget_s / max(once_s, 1e-6))))
    draw = random.Random(0)
    order = [draw.sample(list(works), len(works)) for _ in range(rounds)]
    measure = _cuda_rounds if device == "cuda" else _cpu_rounds
    return {name: Samples(tuple(s)) for name, s in measure(works, order).items()}


def host_seconds(work: Work, rounds: int = 20) -> float:
    """Median seconds until `work` returns on CUDA, started on an idle device: its launches."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


def device_seconds(work: Work, rounds: int = 5) -> float:
    """Least seconds of the kernels of `work` on CUDA, with the L2 cache overwritten before.

    The device is kept busy until `work` has been enqueued, so that no launch is waited for.
    """
    cache = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    pairs = []
    work()
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        torch.cuda._sleep(400_000)
        start.record()
        work()
        end.record()
        pairs.append((start, end))
        torch.cuda.synchronize()
    return min(start.elapsed_time(end) for start, end in pairs) / 1e3


def graph_median(work: Work, rounds: int = 30) -> float:
    """Median seconds of `work` replayed as a CUDA graph.

    Raises:
        NotCapturableError: if it cannot be captured.
    """
    capture = CudaCapture(torch.device("cuda", torch.cuda.current_device()))
    for _ in range(3):
        _, reason = capture.rehearse(work)
    if reason is not None:
        raise NotCapturableError(reason)
    replay = capture.record(work)
    return interleave({"graph": replay}, "cuda", budget_s=0.002 * rounds)["graph"].median


def _warm_up(work: Work, device: str) -> float:
    """Seconds of a pass, after compilation, autotuning and first allocations."""
    for _ in range(3 if device == "cuda" else 1):
        work()
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def _cpu_rounds(works: Mapping[str, Work], order: list[list[str]]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for names in order:
        for name in names:
            start = time.perf_counter()
            works[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _cuda_rounds(works: Mapping[str, Work], order: list[list[str]]) -> dict[str, list[float]]:
    cache = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in works}
    for names in order:
        for name in names:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.zero_()
            torch.cuda.synchronize()
            start.record()
            works[name]()
            end.record()
            torch.cuda.synchronize()
            events[name].append((start, end))
    return {n: [a.elapsed_time(b) / 1e3 for a, b in pairs] for n, pairs in events.items()}


def synchronize(device: str) -> None:
    """Wait for the device; nothing to do on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()

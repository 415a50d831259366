"""What the hardware allows: the work of a phase against the device's measured rates.

Letters: T tokens, H model width, F expert width, P pre-activation width (F, or 2F for SwiGLU),
E experts, S = T*K routed rows.
"""

import time
from dataclasses import dataclass

import torch

from benchmarks.stopwatch import Work, synchronize
from benchmarks.workloads import DTYPES, Case, Problem
from emergence_kernels.activations import pre_activation_width


@dataclass(frozen=True)
class Rates:
    """Measured on this device."""

    flops_per_s: float
    """Of one large square matrix product in the dtype."""
    bytes_per_s: float
    """Read plus written by a large copy."""


@dataclass(frozen=True)
class Cost:
    """Least work of a phase: matrix products only, every tensor moved once."""

    flops: float
    bytes: float

    def seconds(self, rates: Rates) -> float:
        """The roofline: whichever of arithmetic and traffic takes longer."""
        return max(self.flops / rates.flops_per_s, self.bytes / rates.bytes_per_s)


def layer_cost(case: Case, problem: Problem) -> dict[str, Cost]:
    """Cost of forward, backward and full for these numbers.

    Forward reads x and the weights of the experts that were hit and writes y. Backward reads x, dy
    and those weights again and writes dx and the gradients of all weights. Activations are free,
    since they could stay on chip.
    """
    shape = case.shape
    size = DTYPES[case.dtype].itemsize
    width = pre_activation_width(case.activation, shape.width)
    per_expert = shape.hidden * width + shape.width * shape.hidden
    hit = int(problem.decision.topk_experts.unique().numel())
    tokens = shape.tokens * shape.hidden
    forward = Cost(2.0 * shape.rows * per_expert, size * (2.0 * tokens + hit * per_expert))
    backward = Cost(2 * forward.flops, size * (3.0 * tokens + (hit + shape.experts) * per_expert))
    full = Cost(forward.flops + backward.flops, forward.bytes + backward.bytes)
    return {"forward": forward, "backward": backward, "full": full}


def measure_rates(device: str, dtype: str) -> Rates:
    """Rates of `device` for `dtype` now: the best of several runs in a fraction of a second.

    To be measured with each group, since clocks and neighbours change.
    """
    edge, copied = (1024, 2**27)
    if device == "cuda":
        edge, copied = (4096 if dtype == "fp32" else 8192, 2**30)
    # drawn on the CPU: a capture that failed leaves CUDA's generator unusable
    piece = torch.randn(1024, 1024).to(device, DTYPES[dtype])
    a, b = (piece.repeat(edge // 1024, edge // 1024) for _ in range(2))
    source = torch.zeros(copied, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    product_s = _best_seconds(lambda: torch.mm(a, b), device)
    copy_s = _best_seconds(lambda: target.copy_(source), device)
    return Rates(2.0 * edge**3 / product_s, 2.0 * copied / copy_s)


def _best_seconds(work: Work, device: str, runs: int = 5) -> float:
    repeats = 10 if device == "cuda" else 1
    work()
    times = []
    for _ in range(runs):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize(device)
        times.append((time.perf_counter() - start) / repeats)
    return min(times)

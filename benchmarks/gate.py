"""Correct before fast: what a contestant's output and gradients must satisfy to be ranked.

An error is the root mean square of (found - exact), relative to the largest exact value, where
exact is the sequential path in fp64. A contestant passes when none of its tensors is further off
than `FACTOR` times the sequential path in the same dtype; no path is asked for less than the error
of a correctly rounded result.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.workloads import Problem
from moe_emergence.moe import get_dispatcher

FACTOR = {torch.float32: 2.0, torch.bfloat16: 1.5, torch.float16: 1.5}
WRONG = 0.02
"""Above this error a result is no rounding of the right one in any dtype measured here."""

Verdict = Literal["passed", "imprecise", "failed"]
Results = Mapping[str, Tensor]
"""Output "y" and the gradient of every leaf, by name."""


@dataclass(frozen=True)
class Judgement:
    """Verdict, and the tensor that decided it."""

    verdict: Verdict
    note: str
    """What is wrong, in one line; empty for a pass."""
    worst_ratio: float | None
    """Largest error as a multiple of the sequential path's own (at least half an ulp)."""


def evaluate(run: Callable[[], Tensor], leaves: Mapping[str, Tensor], dy_TH: Tensor) -> Results:
    """Output and gradients of one pass."""
    y_TH = run()
    gradients = torch.autograd.grad(y_TH, list(leaves.values()), dy_TH.to(y_TH.dtype))
    return {"y": y_TH.detach(), **dict(zip(leaves, gradients, strict=True))}


def sequential_results(problem: Problem) -> Results:
    """What the definition of correct gives in the problem's own dtype."""
    sequential, decision = get_dispatcher("sequential"), problem.decision
    return evaluate(
        lambda: sequential(
            problem.x_TH, decision.topk_experts, decision.topk_weights, problem.experts
        ),
        problem.leaves,
        problem.dy_TH,
    )


class Gate:
    """Judges contestants on one problem; the exact result is computed once, in fp64."""

    def __init__(self, problem: Problem) -> None:
        self.dtype = problem.x_TH.dtype
        self.exact = sequential_results(problem.to(torch.float64))
        own = sequential_results(problem)
        # a rounding error is uniform: its mean square is a third of the largest
        floor = torch.finfo(self.dtype).eps / 2 / 3**0.5
        self.allowed = {name: max(self._error(name, own[name]), floor) for name in self.exact}

    def judge(self, found: Results) -> Judgement:
        """Compare every tensor of `found` with the exact one."""
        worst_name, worst = "", 0.0
        for name, exact in self.exact.items():
            if name not in found or found[name].shape != exact.shape:
                return Judgement("failed", f"{name} is missing or has another shape", None)
            if not found[name].isfinite().all():
                return Judgement("failed", f"{name} is not finite", None)
            error = self._error(name, found[name])
            if error > max(WRONG, FACTOR[self.dtype] * self.allowed[name]):
                return Judgement("failed", f"{name} is wrong: relative rms error {error:.2g}", None)
            if error / self.allowed[name] > worst:
                worst_name, worst = name, error / self.allowed[name]
        if worst > FACTOR[self.dtype]:
            note = f"{worst_name} is {worst:.1f} times as far from fp64 as sequential's"
            return Judgement("imprecise", note, worst)
        return Judgement("passed", "", worst)

    def _error(self, name: str, found: Tensor) -> float:
        exact = self.exact[name]
        scale = max(float(exact.abs().max()), torch.finfo(torch.float64).tiny)
        return float((found.double() - exact).square().mean().sqrt()) / scale

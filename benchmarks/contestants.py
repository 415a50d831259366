"""Who takes part: this library's dispatchers, their peers, and the floor.

A contestant is built from a `Problem`, so that all of them see the same numbers. One that cannot
take part says why with `Absent`, which becomes a row of the results.
Letters: T tokens, H model width, F expert width, E experts, K experts per token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.gate import Results
from benchmarks.workloads import Problem
from emergence_kernels.activations import activate
from moe_emergence.moe import get_dispatcher


class Absent(Exception):
    """A contestant that cannot take part; `verdict` is what its row says, the message why."""

    def __init__(self, verdict: str, reason: str) -> None:
        super().__init__(reason)
        self.verdict = verdict


def not_installed(error: Exception) -> Absent:
    """The row of a package that is missing, or too old or new to import from."""
    return Absent("not installed", " ".join(str(error).split())[:200])


def not_applicable(reason: str) -> Absent:
    """The row of a contestant that does not compute this case."""
    return Absent("not applicable", reason)


@dataclass(frozen=True)
class Contestant:
    """One way to compute a problem."""

    run: Callable[[], Tensor]
    """Forward pass, building the autograd graph: (T, H)."""
    leaves: Mapping[str, Tensor]
    """What gets a gradient, under the names of `Problem.leaves`."""
    transposed: frozenset[str] = frozenset()
    """Leaves held as (E, out, in) copies of the problem's (E, in, out) weights."""
    is_floor: bool = False
    """Computes something cheaper with the same active FLOPs; not compared, only timed."""

    def canonical(self, found: Results) -> Results:
        """`found` with every gradient in the layout of the problem's weights."""
        return {k: v.transpose(1, 2) if k in self.transposed else v for k, v in found.items()}


Prepare = Callable[[Problem], Contestant]


@dataclass(frozen=True)
class Entry:
    """A contestant by name, before it has seen a problem."""

    name: str
    prepare: Prepare
    about: str = field(default="", compare=False)


def dispatcher_entry(name: str, about: str) -> Entry:
    """The entry of one of this library's dispatchers."""

    def prepare(problem: Problem) -> Contestant:
        try:
            dispatcher = get_dispatcher(name)
        except ValueError as error:
            raise not_installed(error) from error
        decision = problem.decision
        return Contestant(
            lambda: dispatcher(
                problem.x_TH, decision.topk_experts, decision.topk_weights, problem.experts
            ),
            problem.leaves,
        )

    return Entry(name, prepare, about)


def _prepare_dense(problem: Problem) -> Contestant:
    """One MLP of width K*F over the T tokens: the active FLOPs of the mixture, nothing routed."""
    experts, top_k = problem.experts, problem.decision.topk_experts.shape[1]
    parts = experts.w1[:top_k].detach().chunk(2 if experts.activation == "swiglu" else 1, dim=2)
    # the K experts side by side; for SwiGLU all gates, then all up projections
    w1_HP = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)
    w1_HP = w1_HP.contiguous().requires_grad_()
    w2_FH = experts.w2[:top_k].detach().flatten(0, 1).clone().requires_grad_()
    leaves = {"x": problem.x_TH, "w1": w1_HP, "w2": w2_FH}
    if experts.w1_bias is not None and experts.w2_bias is not None:
        b1_P = experts.w1_bias[:top_k].detach().flatten().clone().requires_grad_()
        b2_H = experts.w2_bias[:top_k].detach().sum(dim=0).requires_grad_()
        leaves |= {"b1": b1_P, "b2": b2_H}

        def run() -> Tensor:
            act_TF = activate(torch.addmm(b1_P, problem.x_TH, w1_HP), experts.activation)
            return torch.addmm(b2_H, act_TF, w2_FH)

    else:

        def run() -> Tensor:
            return activate(problem.x_TH @ w1_HP, experts.activation) @ w2_FH

    return Contestant(run, leaves, is_floor=True)


OURS = (
    dispatcher_entry("sequential", "loop over the experts; the definition of correct"),
    dispatcher_entry("auto", "what a user gets who chooses nothing"),
    dispatcher_entry("fused", "this library's operator"),
    dispatcher_entry("grouped", "torch.nn.functional.grouped_mm and autograd"),
)
FLOOR = Entry("dense-floor", _prepare_dense, "dense MLP of the same active FLOPs, no routing")

"""Whether a path's results are right, given the definition's in the same arithmetic and in fp64.

**Errors** are differences from fp64, relative to the largest value of the exact tensor in all draws
(of one draw alone it may be what a cancellation left).

**On the root mean square**, pooled over all elements of all draws, a path may have at most
`Arithmetic.factor` times the error of the sequential path. The mean square is a sum of many small
terms and hardly fluctuates: over n independent errors the logarithm of the ratio of two of them has
standard deviation 1/sqrt(n). From 256 elements on, a path no worse than the definition stays below
the low-precision factor, ln 1.5 = 0.41, by 6.5 standard deviations. Below 256 elements (a single
token, a handful of routing weights) the factor is widened to stay as many away:
`factor ** (16 / sqrt(n))`. The router's gradient of the task has as many independent errors as
there are routing weights, each as large as its weight sways the router (Satterthwaite's degrees
of freedom), however many elements it has.

**On the largest error** twice the factor is allowed. It catches what the mean hides, one wrong row
among thousands. But the ratio of two maxima depends on two elements, and has been seen at 2.4 for
paths whose mean squares agreed to 5%.

**No path is asked for more than a correctly rounded result**: errors of up to half a unit in the
last place of each element, uniform. In fp32, whose sums nothing wider holds, a path may add n terms
one after another: the partial sums of random terms grow as sqrt(k), each is rounded, and together
that is sqrt(n/2) correctly rounded results. (The definition's `torch.sum` adds pairwise and does
better; a matrix product with the tokens' memberships does not, and is no worse for it.)

**In fp64** the sequential path is the exact one, and the other may differ by the errors of both: a
sum of L terms is off by at most L * eps/2 of the terms' size in each, so L * eps, where L counts
the additions on the longest way from an input to a gradient.

**Exactly right, or wrong**: shapes, dtypes, chosen experts, which gradients exist, finiteness, and
zero as the gradient of an expert without tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from emergence_kernels.activations import pre_activation_width
from moe_emergence.certificate.arithmetic import Arithmetic
from moe_emergence.certificate.cases import Case
from moe_emergence.certificate.problem import UNJUDGED, Results

ENOUGH = 256
"""Elements from which on the ratio of two mean squares is trusted as it is."""
WORST = 2.0
"""What the largest error may have of the factor on the mean square."""


class Draw(NamedTuple):
    """Results of the judged path, of the definition in the same arithmetic, and in fp64."""

    found: Results
    sequential: Results
    exact: Results


@dataclass(frozen=True)
class Verdict:
    """One tensor of one case, over all draws."""

    tensor: str
    elements: int
    rms: float
    worst: float
    sequential_rms: float
    sequential_worst: float
    rms_bound: float
    worst_bound: float
    ratio: float
    """rms in units of the sequential path's own (of the least that is asked for where that is
    larger); in fp64 the largest error in units of its bound."""
    problem: str | None
    """What is wrong, or None."""


def additions(case: Case) -> int:
    """L of a case: the two products of the forward pass, the two of the backward pass, the sum over
    tokens, and the routing; 16 for the activation."""
    up = pre_activation_width(case.activation, case.width)
    return 3 * case.hidden + case.width + up + case.tokens + case.experts + case.top_k + 16


def judge(
    draws: Sequence[Draw], arithmetic: Arithmetic, case: Case, independent: int | None = None
) -> list[Verdict]:
    """One verdict per tensor of the definition's results.

    `independent` is how many errors a draw makes that all others follow from, where that is known:
    those of a model's gradients are made in its experts.
    """
    names = draws[0].exact.keys()
    return [
        _judge_tensor(name, draws, arithmetic, case, independent)
        for name in names
        if name not in UNJUDGED
    ] + [
        _wrong(name, "a gradient the definition does not have")
        for name in sorted(draws[0].found.keys() - names)
    ]


def terms(tensor: str, case: Case) -> int:
    """Terms n of the sum that ends in an element of `tensor`."""
    up = pre_activation_width(case.activation, case.width)
    return {"y": case.width, "x": up, "routing weights": case.hidden}.get(tensor, case.tokens)


def _judge_tensor(
    name: str, draws: Sequence[Draw], arithmetic: Arithmetic, case: Case, most: int | None
) -> Verdict:
    for draw in draws:
        problem = _exactly_wrong(name, draw)
        if problem is not None:
            return _wrong(name, problem)
    elements = sum(_of(draw.exact, name).numel() for draw in draws)
    largest = max(_largest(_of(draw.exact, name)) for draw in draws)
    scale = largest or 1.0
    total = [_Errors(), _Errors(), _Errors()]
    for draw in draws:
        exact = _of(draw.exact, name)
        total[0].add((_of(draw.found, name).double() - exact) / scale)
        total[1].add((_of(draw.sequential, name).double() - exact) / scale)
        # a uniform error's mean square is a third of the largest
        # the auxiliary losses never leave the router, which is wide in every arithmetic
        wide = name in ("router by balance", "router by z")
        dtype = _of(draw.sequential, name).dtype if wide else arithmetic.computed
        half_ulp = _half_ulp(exact, dtype) / scale
        if arithmetic.computed == torch.float32:
            half_ulp = half_ulp * max(1.0, terms(name, case) / 2) ** 0.5
        total[2].add(half_ulp / 3**0.5, largest=_largest(half_ulp))
    rms = [errors.rms(elements) for errors in total]
    worst = [errors.worst for errors in total]
    if arithmetic.factor is None:
        bound = additions(case) * torch.finfo(torch.float64).eps if largest else 0.0
        rms_bound, worst_bound = bound, bound
        ratio = worst[0] / bound if bound else worst[0]
    else:
        independent = _independent(name, draws, elements)
        if most is not None:
            independent = min(independent, most * len(draws))
        slack = max(1.0, (ENOUGH / max(independent, 1)) ** 0.5)
        own = max(rms[1:])
        rms_bound = arithmetic.factor**slack * own
        worst_bound = (WORST * arithmetic.factor) ** slack * max(worst[1:])
        ratio = rms[0] / own if own else rms[0]
    problem = None
    if rms[0] > rms_bound:
        problem = f"rms error {rms[0]:.2g}, at most {rms_bound:.2g} allowed"
    elif worst[0] > worst_bound:
        problem = f"largest error {worst[0]:.2g}, at most {worst_bound:.2g} allowed"
    return Verdict(
        name, elements, rms[0], worst[0], rms[1], worst[1], rms_bound, worst_bound, ratio, problem
    )


def _wrong(name: str, problem: str) -> Verdict:
    return Verdict(name, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, problem)


@dataclass
class _Errors:
    """Sum of squares and maximum over all draws."""

    squares: float = 0.0
    worst: float = 0.0

    def add(self, error: Tensor, largest: float | None = None) -> None:
        self.squares += float(error.square().sum())
        self.worst = max(self.worst, _largest(error) if largest is None else largest)

    def rms(self, elements: int) -> float:
        return (self.squares / max(elements, 1)) ** 0.5


def _half_ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest rounding error of every element; 0 of a zero."""
    exponent = torch.frexp(exact).exponent
    unit = torch.full_like(exact, torch.finfo(dtype).eps / 4)
    return torch.where(exact == 0, torch.zeros_like(exact), torch.ldexp(unit, exponent))


def _independent(name: str, draws: Sequence[Draw], elements: int) -> float:
    if name != "router by task":
        return elements
    variance = torch.cat([_of(draw.exact, "sway").square().flatten() for draw in draws])
    top_k = _of(draws[0].exact, "sway").shape[1]
    free = float(variance.sum().square() / variance.square().sum().clamp(min=1e-300))
    # renormalised weights sum to 1: of K errors one is lost
    return free if top_k == 1 else free * (top_k - 1) / top_k


def _of(results: Results, name: str) -> Tensor:
    value = results[name]
    assert value is not None
    return value


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _exactly_wrong(name: str, draw: Draw) -> str | None:
    """What needs no tolerance, in words."""
    found, sequential, exact = (results.get(name) for results in draw)
    if exact is None or sequential is None:
        return None if found is None else "a gradient the definition does not have"
    if found is None:
        return "no gradient"
    chosen = [results["experts"] for results in draw]
    if not all(isinstance(c, Tensor) and torch.equal(c, chosen[0]) for c in chosen):  # type: ignore[arg-type]
        return "the paths chose different experts"
    if found.shape != exact.shape:
        return f"shape {tuple(found.shape)} instead of {tuple(exact.shape)}"
    if found.dtype != sequential.dtype:
        return f"{found.dtype} instead of {sequential.dtype}"
    if not found.isfinite().all():
        return "not finite"
    if name in ("w1", "w1_bias", "w2", "w2_bias"):
        empty_E = (exact == 0).flatten(1).all(dim=1)
        if found[empty_E].any():
            return "not zero for an expert without tokens"
    return None

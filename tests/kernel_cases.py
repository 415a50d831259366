"""Inputs for the Triton kernels of the expert MLP, and the three ways to compute with them.

Letters: T tokens, H model width, F expert width, P pre-activation width (F, or 2F for SwiGLU),
E experts, K experts per token, S = T*K rows sorted by expert.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from conftest import KERNEL_DEVICE
from hypothesis import strategies as st
from numerics import FP64, choose, laid_out, randn, seeded
from torch import Tensor

from emergence_kernels import expert_mlp_batched, reference
from emergence_kernels.activations import Activation, pre_activation_width
from emergence_kernels.batches import BatchPlan
from emergence_kernels.gpu import expert_mlp as kernels
from emergence_kernels.gpu.gemm_config import PRODUCTS, GemmConfig, GemmPlan
from emergence_kernels.permutation import Permutation

ACTIVATIONS: tuple[Activation, ...] = ("gelu_tanh", "swiglu")
SMALL = GemmConfig(16, 16, 16, warps=4, stages=2)
SMALL_PLAN = GemmPlan(*[SMALL] * 5)
MIXED_PLAN = GemmPlan(
    up=GemmConfig(32, 32, 16, warps=1, stages=2, group_m=1),
    down=GemmConfig(32, 16, 32, warps=4, stages=2, group_m=2, persistent=True),
    activation_grad=GemmConfig(32, 16, 16, warps=1, stages=2, group_m=3, persistent=True),
    input_grad=GemmConfig(16, 16, 32, warps=4, stages=2, group_m=8),
    weight_grad=GemmConfig(16, 32, 16, warps=4, stages=2, group_m=2, persistent=True),
)
"""Another tile for every product, so that none can pass with its neighbour's."""
INPUTS = ("x", "weights", "w1", "b1", "w2", "b2")
# relative to the numbers that are summed: an error of structure is of order one
STRUCTURE = {torch.float32: 2e-5, torch.float16: 2e-2}


@dataclass(frozen=True)
class Shape:
    """A case of the expert MLP."""

    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int
    kind: str = "random"
    """How tokens choose, see `numerics.choose`."""
    activation: Activation = "gelu_tanh"
    biases: tuple[bool, bool] = (True, True)
    transposed: tuple[bool, bool] = (False, False)
    """Whether w1 and w2 are views of their transposes."""
    absent: bool = False
    """Whether some rows have no expert: they choose among E + 1, of which the last is not there."""

    @property
    def pre_width(self) -> int:
        return pre_activation_width(self.activation, self.width)


class Case(NamedTuple):
    """Tensors of the expert MLP, each with NaN before and behind it."""

    x: Tensor
    weights: Tensor
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    dy: Tensor
    permutation: Permutation
    activation: Activation


def surrounded(tensor: Tensor, value: float = float("nan")) -> Tensor:
    """The tensor on the kernels' device, contiguous, inside a larger memory full of `value`."""
    around = 64 + tensor[:1].numel()
    buffer = torch.full(
        (tensor.numel() + 2 * around,), value, dtype=tensor.dtype, device=KERNEL_DEVICE
    )
    inner = buffer[around : around + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner


def permutation_of(chosen_TK: Tensor, experts: int) -> Permutation:
    """The routing, inside memory whose entries would lead to NaN or to rows that do not exist."""
    *indices, offsets = reference.sort_by_expert(chosen_TK.cpu(), experts)
    rows = chosen_TK.numel()
    return Permutation(*(surrounded(i, -1) for i in indices), surrounded(offsets, rows + 17))


def make_case(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    x_layout: str = "rows apart",
    dy_layout: str = "rows apart",
) -> Case:
    """Numbers of order one, whose products are of order one too."""

    def draw(number: int, *size: int, fan_in: int = 1) -> Tensor:
        return (randn(*size, seed=10 * seed + number) / fan_in**0.5).to(dtype)

    tokens, hidden, width, experts = shape.tokens, shape.hidden, shape.width, shape.experts

    def weight(number: int, fan_in: int, fan_out: int, transposed: bool) -> Tensor:
        drawn = draw(number, experts, fan_in, fan_out, fan_in=fan_in)
        return surrounded(drawn.mT.contiguous()).mT if transposed else surrounded(drawn)

    weights = 0.1 + torch.rand(tokens, shape.top_k, generator=seeded(10 * seed + 7))
    choices = experts + shape.absent
    permutation = permutation_of(choose(tokens, choices, shape.top_k, shape.kind, seed), choices)
    if shape.absent:
        permutation = permutation._replace(expert_offsets=permutation.expert_offsets[:-1])
    return Case(
        laid_out(surrounded(draw(1, tokens, hidden)), x_layout),
        surrounded(weights),
        weight(2, hidden, shape.pre_width, shape.transposed[0]),
        surrounded(draw(3, experts, shape.pre_width)) if shape.biases[0] else None,
        weight(4, width, hidden, shape.transposed[1]),
        surrounded(draw(5, experts, hidden)) if shape.biases[1] else None,
        laid_out(surrounded(draw(6, tokens, hidden)), dy_layout),
        permutation,
        shape.activation,
    )


EDGES = {
    "one-token": Shape(1, 16, 16, 4, 1),
    "weights-stored-the-other-way": Shape(17, 9, 24, 3, 2, transposed=(True, True)),
    "gate-stored-the-other-way": Shape(
        9, 24, 9, 3, 2, "random", "swiglu", transposed=(True, False)
    ),
    "rows-without-an-expert": Shape(19, 9, 8, 3, 2, absent=True),
    "every-token-lacks-one": Shape(5, 9, 8, 1, 2, absent=True),
    "one-token-of-all-experts": Shape(1, 9, 5, 3, 3),
    "one-expert": Shape(17, 8, 8, 1, 1),
    "odd-widths": Shape(7, 5, 9, 3, 2),
    "widths-of-8-not-16": Shape(18, 24, 40, 3, 2),
    "two-tiles-of-one-expert-and-no-others": Shape(19, 16, 16, 5, 1, "same"),
    "first-experts-empty": Shape(9, 9, 16, 6, 2, "few"),
    "all-experts": Shape(6, 8, 8, 5, 5),
    "no-biases": Shape(9, 9, 5, 3, 2, biases=(False, False)),
    "first-bias-only": Shape(5, 9, 5, 3, 2, biases=(True, False)),
    "second-bias-only": Shape(5, 9, 5, 3, 2, biases=(False, True)),
}

Computed = dict[str, Tensor | None]
EVERYTHING = (True,) * 6


def by_kernels(
    case: Case,
    plan: GemmPlan = SMALL_PLAN,
    wanted: tuple[bool, ...] = EVERYTHING,
    kept: torch.dtype | None = None,
) -> Computed:
    """Output, pre-activations and gradients of the kernels; `kept` as the weights are kept."""
    x, weights, w1, b1, w2, b2, dy, permutation, activation = case
    y, pre = kernels.forward(x, weights, w1, b1, w2, b2, permutation, activation, plan)
    gradients = kernels.backward(
        dy, x, weights, w1, w2, b2, pre, permutation, activation, kept or x.dtype, plan,
        _given(case, wanted),
    )  # fmt: skip
    rows = int(permutation.expert_offsets[-1])
    return {"y": y, "pre": pre[:rows], **dict(zip(INPUTS, gradients, strict=True))}


def by_batches(
    case: Case,
    wanted: tuple[bool, ...] = EVERYTHING,
    kept: torch.dtype | None = None,
    plan: BatchPlan | None = None,
) -> Computed:
    """The same from the plain-torch path, in the same dtype."""
    x, weights, w1, b1, w2, b2, dy, permutation, activation = case
    if kept is not None:
        w1, b1, w2, b2 = (None if t is None else t.to(kept) for t in (w1, b1, w2, b2))
    chosen = "" if plan is None else plan.encoded
    y, pre = expert_mlp_batched.forward(x, weights, w1, b1, w2, b2, permutation, activation, chosen)
    gradients = expert_mlp_batched.backward(
        dy, x, weights, w1, w2, b2, pre, permutation, activation, _given(case, wanted), chosen
    )
    rows = int(permutation.expert_offsets[-1])
    return {"y": y, "pre": pre[:rows], **dict(zip(INPUTS, gradients, strict=True))}


def all_in_one(case: Case) -> Computed:
    """`by_batches`, with all experts in one batch, padded however much that is."""
    return by_batches(case, plan=BatchPlan(1e18, 2**62))


def _given(case: Case, wanted: tuple[bool, ...]) -> tuple[bool, ...]:
    """`wanted`, less the biases that there are not."""
    return tuple(want and tensor is not None for want, tensor in zip(wanted, case[:6], strict=True))


def exactly(case: Case) -> Computed:
    """The same in fp64, from the twin and autograd."""
    leaves = [None if t is None else t.to(FP64).requires_grad_() for t in case[:6]]
    x, weights, w1, b1, w2, b2 = leaves
    offsets = case.permutation.expert_offsets
    pre = reference.grouped_gemm(x[case.permutation.token_idx], w1, offsets, b1)
    y = reference.expert_mlp(x, weights, w1, b1, w2, b2, case.permutation, case.activation)
    found = torch.autograd.grad(y, [t for t in leaves if t is not None], case.dy.to(FP64))
    gradients = iter(found)
    return {
        "y": y.detach(),
        "pre": pre.detach()[: int(offsets[-1])],
        **{n: None if t is None else next(gradients) for n, t in zip(INPUTS, leaves, strict=True)},
    }


def rounded(exact: Computed, case: Case) -> Computed:
    """Exact results in the dtypes that a path has to return them in."""
    return {
        name: None if t is None else t.to(case.weights if name == "weights" else case.x)
        for name, t in exact.items()
    }


@st.composite
def configs(draw: st.DrawFn) -> GemmConfig:
    """Small tiles, so that a few rows and columns need several."""
    sides = st.sampled_from([16, 16, 32])
    return GemmConfig(
        draw(sides),
        draw(sides),
        draw(sides),
        warps=draw(st.sampled_from([1, 4])),  # few warps: epilogues in several parts
        stages=2,
        group_m=draw(st.integers(1, 8)),
        persistent=draw(st.booleans()),
    )


def plans() -> st.SearchStrategy[GemmPlan]:
    return st.builds(GemmPlan, **{product: configs() for product in PRODUCTS})


@st.composite
def shapes(draw: st.DrawFn, of_operator: bool = False) -> Shape:
    """With `of_operator` also what only the whole operator has to deal with."""
    experts = draw(st.integers(1, 5), label="E")
    sides = st.sampled_from([1, 5, 8, 9, 16, 17, 24])
    return Shape(
        tokens=draw(st.integers(0, 19), label="T"),
        hidden=draw(sides, label="H"),
        width=draw(sides, label="F"),
        experts=experts,
        top_k=draw(st.integers(1, min(experts, 3)), label="K"),
        kind=draw(st.sampled_from(["random", "same", "few"])),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        biases=draw(st.tuples(st.booleans(), st.booleans())),
        transposed=(of_operator and draw(st.booleans()), of_operator and draw(st.booleans())),
        absent=of_operator and draw(st.booleans()),
    )


def group_sizes(largest: int = 5) -> st.SearchStrategy[list[int]]:
    """Rows of every expert: often none, else up to more than a tile."""
    return st.lists(st.sampled_from([0, 0, 1, 3, 16, 17, 33]), min_size=1, max_size=largest)


def offsets_of(sizes: list[int]) -> Tensor:
    ends = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    return surrounded(ends, int(ends[-1]) + 17)

"""The grid: every shape, routing and layout that broke a mixture of experts somewhere, by name.

Letters: T tokens, H model width, F expert width, E experts, K experts per token.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from emergence_kernels.activations import Activation

ACTIVATIONS: tuple[Activation, ...] = ("gelu_tanh", "swiglu")

Routing = Literal["learned", "given", "frozen", "hash"]
Load = Literal["any", "few", "one"]
Layout = Literal["contiguous", "transposed", "strided", "expanded"]
Frozen = Literal["nothing", "experts", "x"]


@dataclass(frozen=True)
class Case:
    """One layer and the way it is called."""

    name: str
    reason: str
    """What went wrong there before, or could."""
    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int
    activation: Activation = "gelu_tanh"
    routing: Routing = "learned"
    """The layer's router, or "given" weights that neither are 1 nor sum to it."""
    load: Load = "any"
    """Experts that get tokens: any, K + 1 of them, or the same K for every token."""
    x_layout: Layout = "contiguous"
    dy_layout: Layout = "contiguous"
    frozen: Frozen = "nothing"
    """What wants no gradient."""
    constant: bool = False
    """Whether w2 is zero: an expert returns its bias, and all error is the combine's."""


# fmt: off
_SHAPES = (
    Case("top-1", "straight-through weight", 96, 32, 64, 8, 1),
    Case("top-2", "renormalised weights", 96, 32, 64, 8, 2),
    Case("top-4", "combine of several rows", 96, 32, 64, 8, 4),
    Case("top-1 given weights", "weights that are not 1", 96, 32, 64, 8, 1, routing="given"),
    Case("top-2 given weights", "weights that do not sum to 1", 96, 32, 64, 8, 2, routing="given"),
    Case("K=E", "every expert sees every token", 33, 16, 24, 3, 3),
    Case("E=1", "nothing to sort", 40, 16, 24, 1, 1),
    Case("empty experts", "groups without rows, anywhere", 96, 32, 64, 8, 2, load="few"),
    Case("one takes all", "one group, the others empty", 130, 24, 40, 4, 1, load="one"),
    Case("two take all", "the same two groups for every token", 130, 24, 40, 6, 2, load="one"),
    Case("T=1", "a single token", 1, 32, 64, 8, 1),
    Case("T=1 top-2", "a single token, two rows", 1, 32, 64, 8, 2),
    Case("T=0", "no token: every gradient zero", 0, 32, 64, 8, 2),
    Case("T=3 E=16", "more experts than tokens", 3, 32, 64, 16, 1),
    Case("T=130", "rows not a multiple of a tile", 130, 64, 128, 4, 1),
    Case("T=257 top-2", "rows not a multiple of a tile", 257, 64, 64, 4, 2),
    Case("T=129 one group", "one row past a tile of 128", 129, 64, 64, 4, 1, load="one"),
    Case("H=24 F=40", "widths not multiples of 16", 96, 24, 40, 8, 1),
    Case("H=40 F=136", "widths not multiples of 16 or 128", 96, 40, 136, 4, 2),
    Case("H=72 F=200", "widths not multiples of 64", 64, 72, 200, 4, 1),
    Case("H=136 F=72", "experts narrower than the model", 64, 136, 72, 4, 2),
    Case("H=5 F=33", "odd widths: rows not of 16 bytes", 64, 5, 33, 4, 2),
    Case("H=33 F=5", "odd widths: rows not of 16 bytes", 64, 33, 5, 4, 1),
    Case("H=8 F=8", "narrower than any tile", 64, 8, 8, 4, 2),
    Case("E=64 top-8", "fine-grained experts of few rows", 64, 32, 16, 64, 8),
    Case("T=2048", "gradients that sum many rows", 2048, 16, 16, 2, 1),
)
_CALLS = (
    Case("x transposed", "tokens not contiguous", 96, 32, 64, 8, 1, x_layout="transposed"),
    Case("x strided", "tokens with gaps of NaN", 96, 32, 64, 8, 2, x_layout="strided"),
    Case("dy transposed", "upstream gradient not contiguous", 96, 32, 64, 8, 2,
         dy_layout="transposed"),
    Case("dy strided", "upstream gradient with gaps of NaN", 96, 32, 64, 8, 1,
         dy_layout="strided"),
    Case("dy expanded", "upstream gradient of stride 0", 96, 32, 64, 8, 2, dy_layout="expanded"),
    Case("frozen experts", "only tokens and weights want a gradient", 96, 32, 64, 8, 2,
         frozen="experts"),
    Case("frozen x", "the first layer of a model", 96, 32, 64, 8, 2, frozen="x"),
    Case("frozen router", "weights want no gradient", 96, 32, 64, 8, 2, routing="frozen"),
    Case("hash router", "weights 1/K without gradient", 96, 32, 64, 8, 2, routing="hash"),
)
_CONSTANT = Case("constant experts", "weights and sums of a token are rounded once",
                 96, 32, 16, 16, 8, routing="given", constant=True)
_REALISTIC = Case("realistic", "a layer of realistic proportions", 256, 96, 384, 8, 1)
_PREDECESSOR = Case("predecessor", "GPT-2's own widths", 1024, 768, 3072, 8, 1)
# fmt: on


def grid(device: torch.device, activations: Sequence[Activation] = ACTIVATIONS) -> list[Case]:
    """Every shape with every activation (GELU has biases, SwiGLU none), every way to call a layer
    with one of them in turn."""
    shapes = (*_SHAPES, _PREDECESSOR if device.type == "cuda" else _REALISTIC)
    constant = [_CONSTANT] if _CONSTANT.activation in activations else []
    turns = [activations[i % len(activations)] for i in range(len(_CALLS))]
    return [replace(case, activation=a) for case in shapes for a in activations] + [
        *constant,
        *(replace(case, activation=a) for case, a in zip(_CALLS, turns, strict=True)),
    ]


def random_cases(
    count: int, seed: int, activations: Sequence[Activation] = ACTIVATIONS
) -> list[Case]:
    """`count` more with everything drawn; the same for the same seed."""
    rng = random.Random(seed)
    cases = []
    for i in range(count):
        experts = rng.randint(1, 12)
        cases.append(
            Case(
                f"random {i}",
                f"seed {seed}",
                tokens=rng.choice((rng.randint(0, 20), rng.randint(1, 300))),
                hidden=rng.choice((rng.randint(1, 80), 8 * rng.randint(1, 12))),
                width=rng.choice((rng.randint(1, 160), 8 * rng.randint(1, 24))),
                experts=experts,
                top_k=rng.randint(1, min(experts, 8)),
                activation=rng.choice(activations),
                routing=rng.choice(("learned", "learned", "given", "frozen", "hash")),
                load=rng.choice(("any", "any", "few", "one")),
                x_layout=rng.choice(("contiguous", "transposed", "strided")),
                dy_layout=rng.choice(("contiguous", "transposed", "strided", "expanded")),
                frozen=rng.choice(("nothing", "nothing", "experts", "x")),
            )
        )
    return cases

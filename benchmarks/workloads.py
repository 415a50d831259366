"""What is measured: shapes, routings and numbers, as data.

Letters: T tokens, H model width, F expert width, E experts, K experts per token.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from emergence_kernels.activations import Activation
from moe_emergence.moe import Experts, RouterDecision

Routing = Literal["balanced", "zipf", "collapsed"]
ROUTINGS: tuple[Routing, ...] = ("balanced", "zipf", "collapsed")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """One mixture layer's sizes."""

    name: str
    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int
    why: str
    gpu_only: bool = False

    @property
    def rows(self) -> int:
        """S = T*K routed rows."""
        return self.tokens * self.top_k


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("predecessor-k1", 1024, 768, 3072, 8, 1, "the predecessor's micro-batch, top-1"),
        Shape("predecessor-k2", 1024, 768, 3072, 8, 2, "the predecessor's micro-batch, top-2"),
        Shape("small", 512, 256, 1024, 8, 1, "a demo's layer: overheads dominate"),
        Shape("fine-grained", 1024, 256, 256, 64, 8, "many narrow experts, 128 rows each"),
        Shape("long", 16384, 768, 3072, 8, 1, "a large batch: compute-bound", gpu_only=True),
        Shape("tiny", 48, 16, 32, 4, 2, "for the smoke tests; measures nothing"),
    )
}


@dataclass(frozen=True)
class Case:
    """One group of the layer suite: every contestant meets exactly these numbers."""

    shape: Shape
    routing: Routing = "balanced"
    dtype: str = "fp32"
    activation: Activation = "gelu_tanh"

    @property
    def name(self) -> str:
        """Readable identity, also the key of a group in results."""
        return f"{self.shape.name}/{self.activation}/{self.dtype}/{self.routing}"


@dataclass(frozen=True, eq=False)
class Problem:
    """The numbers of a case: inputs, weights, routing and an upstream gradient."""

    x_TH: Tensor
    dy_TH: Tensor
    decision: RouterDecision
    experts: Experts

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Everything that wants a gradient, by name."""
        named = dict(self.experts.named_parameters())
        return {"x": self.x_TH, "weights": self.decision.topk_weights, **named}

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same numbers in another floating dtype; routing weights are at least fp32."""
        wide = torch.promote_types(dtype, torch.float32)
        shape = self.experts.w1.shape[1], self.experts.w2.shape[1]
        experts = Experts(self.experts.num_experts, *shape, self.experts.activation)
        experts = experts.to(self.x_TH.device, dtype)
        experts.load_state_dict(self.experts.state_dict())
        decision = decision_from(
            self.decision.topk_experts,
            self.decision.topk_weights.detach().to(wide),
            self.decision.num_experts,
        )
        x_TH = self.x_TH.detach().to(dtype).requires_grad_()
        return Problem(x_TH, self.dy_TH.to(dtype), decision, experts)


def decision_from(experts_TK: Tensor, weights_TK: Tensor, num_experts: int) -> RouterDecision:
    """A decision with these experts and leaf weights; its probabilities are uniform."""
    probs_TE = weights_TK.new_full((len(experts_TK), num_experts), 1 / num_experts)
    weights_TK = weights_TK.clone().requires_grad_()
    return RouterDecision(probs_TE.log(), probs_TE, probs_TE, experts_TK, weights_TK)


def choose_experts(shape: Shape, routing: Routing, generator: torch.Generator) -> Tensor:
    """(T, K) distinct experts per token.

    balanced: every expert gets the same number of rows, up to one token. zipf: expert e is drawn
    with probability proportional to 1/(e+1). collapsed: all tokens choose the same K experts.
    """
    tokens, experts, top_k = shape.tokens, shape.experts, shape.top_k
    if routing == "collapsed":
        return torch.arange(top_k).expand(tokens, top_k).contiguous()
    if routing == "balanced":
        start_T1 = torch.randperm(tokens, generator=generator)[:, None] * top_k
        return (start_T1 + torch.arange(top_k)) % experts
    chances_E = 1 / torch.arange(1, experts + 1, dtype=torch.float64)
    return torch.multinomial(chances_E.expand(tokens, -1), top_k, generator=generator)


def make_problem(case: Case, device: str, seed: int = 0) -> Problem:
    """The numbers of `case` on `device`.

    Pre-activations are of order one. Every value is representable in bf16, so that the dtypes of
    one shape and routing share their exact result.
    """
    generator = torch.Generator().manual_seed(seed)
    shape, dtype = case.shape, DTYPES[case.dtype]

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=generator)).bfloat16().to(device, dtype)

    experts = Experts(shape.experts, shape.hidden, shape.width, case.activation).to(device, dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            scale = parameter.shape[1] ** -0.5 if parameter.ndim == 3 else 1.0
            parameter.copy_(draw(*parameter.shape, scale=scale))
    chosen_TK = choose_experts(shape, case.routing, generator).to(device)
    weights_TK = 0.1 + torch.rand(shape.tokens, shape.top_k, generator=generator)
    decision = decision_from(chosen_TK, weights_TK.to(device), shape.experts)
    x_TH = draw(shape.tokens, shape.hidden).requires_grad_()
    return Problem(x_TH, draw(shape.tokens, shape.hidden), decision, experts)

"""The numbers of one case, and one run of its layer on them through a given path.

Letters: T tokens, H model width, E experts, K experts per token, N candidates for tokens.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_emergence.certificate.arithmetic import Arithmetic
from moe_emergence.certificate.cases import Case, Layout
from moe_emergence.moe import Dispatcher, MoELayer, RouterDecision, auxiliary_losses, get_dispatcher
from moe_emergence.moe.noise import RouterNoise

Results = dict[str, Tensor | None]
"""Output and gradients by name; None for a gradient that did not come."""

UNJUDGED = ("experts", "sway")
"""Results that are no output: the chosen experts, and how much each choice moves the router."""

FP64 = torch.float64

_MARGIN = 0.02
"""Least distance of the logits that decide: no arithmetic here moves one by a tenth of it."""
_TRIES = 500


@dataclass(frozen=True)
class Problem:
    """A layer and one call of it; every path gets the same numbers."""

    layer: MoELayer
    x_TH: Tensor
    dy_TH: Tensor
    token_ids_T: Tensor


class GivenRouter(nn.Module):
    """A decision from outside, whose weights are parameters."""

    def __init__(self, topk_experts_TK: Tensor, topk_weights_TK: Tensor, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("topk_experts", topk_experts_TK)
        self.topk_weights = nn.Parameter(topk_weights_TK)
        self.num_experts = num_experts

    def forward(
        self, x_TH: Tensor, noise: RouterNoise | None = None, token_ids_T: Tensor | None = None
    ) -> RouterDecision:
        """The same for every input."""
        probs_TE = self.topk_weights.new_full(
            (len(x_TH), self.num_experts), 1 / self.num_experts, requires_grad=False
        )
        return RouterDecision(
            router_logits=probs_TE.log(),
            router_probs=probs_TE,
            noisy_probs=probs_TE,
            topk_experts=self.get_buffer("topk_experts"),
            topk_weights=self.topk_weights,
        )


def draw_problem(case: Case, arithmetic: Arithmetic, device: torch.device, seed: int) -> Problem:
    """Random numbers of order one, rounded to what the arithmetic stores, on `device`.

    Every parameter is scaled by its fan-in and no bias is zero, so that pre-activations, outputs
    and gradients are of order one and each part of the layer shows in all of them.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # the layer's own initialisation is written over
        layer = MoELayer(
            case.hidden,
            case.width,
            case.experts,
            case.top_k,
            activation=case.activation,
            router="learned" if case.routing == "given" else case.routing,
            use_expert_bias=True,
        )
    layer = layer.double()
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            fan_in = {"w1": case.hidden, "w2": case.width, "weight": case.hidden / 4}
            scale = fan_in.get(name.split(".")[1], 1) ** -0.5
            value.copy_(torch.randn(value.shape, generator=rng, dtype=FP64) * scale)
        if case.constant:
            layer.experts.w2.zero_()
    pool = _pool(case, rng)
    layer = layer.to(arithmetic.stored)
    if case.routing in ("learned", "frozen"):
        bias_E = layer.router.get_buffer("expert_bias")
        bias_E.zero_()
        bias_E[pool] = 2.0  # above every difference of two probabilities
        x_TH = _clear_tokens(case, layer.router.state_dict()["weight"], pool, rng)
    else:
        x_TH = torch.randn(case.tokens, case.hidden, generator=rng, dtype=FP64)
    if case.routing == "given":
        order = torch.rand(case.tokens, len(pool), generator=rng).argsort(dim=1)
        weights_TK = 0.1 + torch.rand(case.tokens, case.top_k, generator=rng, dtype=FP64)
        wide = torch.promote_types(arithmetic.stored, torch.float32)
        layer.router = GivenRouter(  # type: ignore[assignment]
            pool[order[:, : case.top_k]], weights_TK.float().to(wide), case.experts
        )
    dy_TH = torch.randn(case.tokens, case.hidden, generator=rng, dtype=FP64)
    layer.experts.requires_grad_(case.frozen != "experts")
    return Problem(
        layer=layer.to(device),
        x_TH=_laid_out(x_TH.to(device, arithmetic.stored), case.x_layout),
        dy_TH=_laid_out(dy_TH.to(device, arithmetic.computed), case.dy_layout),
        token_ids_T=torch.randint(0, 50_000, (case.tokens,), generator=rng).to(device),
    )


def _pool(case: Case, rng: torch.Generator) -> Tensor:
    """The experts that get tokens, anywhere among all of them."""
    sizes = {"any": case.experts, "few": min(case.top_k + 1, case.experts), "one": case.top_k}
    return torch.randperm(case.experts, generator=rng)[: sizes[case.load]]


def _clear_tokens(
    case: Case, router_weight_EH: Tensor, pool: Tensor, rng: torch.Generator
) -> Tensor:
    """(T, H) tokens that fp64 and every lower precision send to the same experts in one order.

    Tokens with two of the deciding logits close to each other are drawn again.
    """
    weight_EH = router_weight_EH.double()[pool]
    kept: list[Tensor] = []
    missing = case.tokens
    for _ in range(_TRIES):
        if missing <= 0:
            break
        x_NH = torch.randn(4 * missing, case.hidden, generator=rng, dtype=FP64)
        x_NH = x_NH.to(router_weight_EH.dtype).double()
        logits = (x_NH @ weight_EH.T).sort(dim=1, descending=True).values[:, : case.top_k + 1]
        clear_N = (logits[:, :-1] - logits[:, 1:] > _MARGIN).all(dim=1)
        kept.append(x_NH[clear_N])
        missing -= int(clear_N.sum())
    if missing > 0:
        raise AssertionError(f"{case.name}: no clearly routed tokens in {_TRIES} tries")
    return torch.cat([*kept, torch.empty(0, case.hidden, dtype=FP64)])[: case.tokens]


def _laid_out(tensor: Tensor, layout: Layout) -> Tensor:
    """The same numbers with other strides (expanded: the first row for all)."""
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "strided":
        wide = tensor.new_full((tensor.shape[0], 2 * tensor.shape[1]), float("nan"))
        wide[:, ::2] = tensor
        return wide[:, ::2]
    if layout == "expanded" and len(tensor):
        return tensor[:1].expand_as(tensor)
    return tensor


def run_layer(
    case: Case, problem: Problem, dispatcher: Dispatcher, arithmetic: Arithmetic
) -> Results:
    """Output and every wanted gradient of the layer through `dispatcher`.

    The router's weight has three gradients: through the routing weights, of the balance loss and of
    the z loss. With K = E the balance loss is constant, and its gradient only rounding: left out.
    """
    layer = problem.layer
    layer.dispatch = dispatcher
    x_TH = problem.x_TH.detach().requires_grad_(case.frozen != "x")
    with arithmetic.active(x_TH.device):
        y_TH, decision = layer(x_TH, None, problem.token_ids_T)
        results: Results = {
            "y": y_TH.detach(),
            "experts": decision.topk_experts,
            "sway": _sway(decision),
        }
        leaves: dict[str, Tensor] = {"x": x_TH, "routing weights": decision.topk_weights}
        leaves.update(layer.experts.named_parameters())
        if case.routing == "learned":
            weight_EH = layer.router.get_parameter("weight")
            leaves["router by task"] = weight_EH
            balance, z = auxiliary_losses([decision])
            losses = {"router by balance": balance, "router by z": z}
            if case.top_k == case.experts:
                del losses["router by balance"]
            for name, loss in losses.items():
                (results[name],) = torch.autograd.grad(loss, weight_EH, retain_graph=True)
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        gradients = torch.autograd.grad(
            y_TH, list(wanted.values()), problem.dy_TH.to(y_TH.dtype), allow_unused=True
        )
    results.update(zip(wanted, gradients, strict=True))
    return results


def _sway(decision: RouterDecision) -> Tensor:
    """(T, K) what a routing weight's gradient does to the router's: the derivative w (1 - w)."""
    chosen_TK = decision.noisy_probs.detach().gather(1, decision.topk_experts)
    if chosen_TK.shape[1] > 1:
        chosen_TK = chosen_TK / chosen_TK.sum(dim=1, keepdim=True)
    return chosen_TK * (1 - chosen_TK)


def run_exact(case: Case, problem: Problem, fp64: Arithmetic) -> Results:
    """The sequential path in fp64 on the problem's numbers as they are stored."""
    wide = Problem(
        layer=copy.deepcopy(problem.layer).double(),
        x_TH=problem.x_TH.double(),
        dy_TH=problem.dy_TH.double(),
        token_ids_T=problem.token_ids_T,
    )
    return run_layer(case, wide, get_dispatcher("sequential"), fp64)

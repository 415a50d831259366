"""What pulls at a learned router: sizes and directions of the gradients of its three losses.

Letters: R blocks, L tokens of a block, E experts, H model width.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from moe_emergence.models import MixtureModel
from moe_emergence.models.mode import evaluating
from moe_emergence.moe import TopKRouter


def router_gradients(model: nn.Module, blocks_RL: Tensor) -> list[dict[str, Any]]:
    """A row for every mixture layer with a router that is trained; none for other models.

    layer; `norm_lm`, `norm_lb`, `norm_z`: norm of the gradient of each loss, times its coefficient,
    with respect to the router's weight (E, H); `cosine_lm_lb`, `cosine_lm_z`, `cosine_lb_z`;
    `agreement_lm` and so on: cosine between the gradients on the first and the second half of the
    blocks, 1 where two texts ask for the same change and 0 where they ask for unrelated ones. lm is
    the straight-through gradient where the layer has it; `variance` joins the three where the model
    has a variance loss. Without router noise and dropout.

    Args:
        model: a mixture of this package; its mode is restored and its `grad` left alone.
        blocks_RL: token ids, shuffled over the domains; two blocks at least.
    """
    if not isinstance(model, MixtureModel):
        return []
    routers = {
        index: layer.router.weight
        for index, layer in model.moe_layers().items()
        if isinstance(layer.router, TopKRouter) and layer.router.weight.requires_grad
    }
    if not routers:
        return []
    with evaluating(model):
        halves = [_gradients(model, list(routers.values()), half) for half in blocks_RL.chunk(2)]
    rows = []
    for place, index in enumerate(routers):
        first, second = ({loss: grads[place] for loss, grads in half.items()} for half in halves)
        mean = {loss: (first[loss] + second[loss]) / 2 for loss in first}
        row: dict[str, Any] = {"layer": index}
        row |= {f"norm_{loss}": float(mean[loss].norm()) for loss in mean}
        for one, other in itertools.combinations(mean, 2):
            row[f"cosine_{one}_{other}"] = _cosine(mean[one], mean[other])
        row |= {f"agreement_{loss}": _cosine(first[loss], second[loss]) for loss in mean}
        rows.append(row)
    return rows


def _gradients(model: Any, weights: list[Tensor], ids_RL: Tensor) -> dict[str, tuple[Tensor, ...]]:
    ids_RL = ids_RL.long().to(model.device)
    out = model(input_ids=ids_RL, labels=ids_RL)
    config = model.config
    losses = {
        "lm": out.lm_loss,
        "lb": config.lb_coef * out.lb_loss,
        "z": config.z_coef * out.z_loss,
    }
    if out.routing_variance is not None:
        losses["variance"] = -config.variance_coef * out.routing_variance
    return {
        name: torch.autograd.grad(loss, weights, retain_graph=True) for name, loss in losses.items()
    }


def _cosine(one: Tensor, other: Tensor) -> float:
    """0 where one of them is 0."""
    return float(torch.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))

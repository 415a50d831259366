"""Routers that start at clusters of what they read.

Letters: T tokens, H model width, E experts.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_emergence.models.modeling import MoEGPT2LMHeadModel
from moe_emergence.moe import TopKRouter

Floats = npt.NDArray[np.floating[Any]]

ENTROPY = 0.5
"""Mean entropy of the probabilities at the start, as a share of log E."""
TEMPERATURE = 0.1
"""Of the transport, in units of the cosine between a state and a centre."""


@torch.no_grad()
def start_routers_at_clusters(
    model: MoEGPT2LMHeadModel, batches: Iterable[Tensor], *, seed: int = 0
) -> None:
    """Make every router's rows the centres of E clusters of the hidden states it reads.

    Balanced spherical k-means: directions are clustered (scikit-learn's k-means), then the centres
    move until clusters are of about one size under entropic transport (arXiv 1911.05371, section
    3.1); clusters wide apart stay of the size that they have. One length of all rows is chosen such
    that the mean entropy of the probabilities is half of log E: neither flat nor saturated. The
    states are those of the model as it is; right after `upcycle` these are the dense model's. Costs
    a forward pass, and a second or two of k-means for 16,384 tokens.

    Args:
        model: with learned or frozen routers; whether they are trained is left as it is.
        batches: token ids (B, L) of the text the model will be trained on; all are used, and their
            hidden states are kept in memory.
        seed: of k-means.

    Raises:
        ValueError: for a hash router, and where there are fewer tokens than experts.
    """
    routers: dict[int, TopKRouter] = {}
    for index, layer in model.moe_layers().items():
        if not isinstance(layer.router, TopKRouter):
            raise ValueError(
                f"--router-init clusters: the router of layer {index} has no weights to start; "
                "give another --router"
            )
        routers[index] = layer.router
    for index, states_TH in _router_inputs(model, routers, batches).items():
        weight_EH = routers[index].weight
        if len(states_TH) < len(weight_EH):
            raise ValueError(
                f"--router-init clusters: {len(states_TH)} tokens for {len(weight_EH)} experts; "
                "give more text"
            )
        weight_EH.copy_(torch.from_numpy(_router_weight(states_TH, len(weight_EH), seed + index)))


def _router_inputs(
    model: MoEGPT2LMHeadModel, routers: dict[int, TopKRouter], batches: Iterable[Tensor]
) -> dict[int, Floats]:
    """(T, H) fp32 inputs of every layer's router."""
    found: dict[int, list[Tensor]] = {index: [] for index in routers}

    def keeper(index: int) -> Any:
        return lambda module, inputs: found[index].append(inputs[0].float().cpu())

    hooks = [router.register_forward_pre_hook(keeper(i)) for i, router in routers.items()]
    was_training = model.training
    model.eval()
    try:
        for input_ids in batches:
            model(input_ids=input_ids.long().to(model.device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return {index: torch.cat(parts).numpy() for index, parts in found.items()}


def _router_weight(states_TH: Floats, num_experts: int, seed: int) -> Floats:
    """(E, H) centres of balanced clusters of the states' directions, at the length for routing."""
    from sklearn.cluster import KMeans  # a second to import

    directions_TH = _normalised(states_TH)
    kmeans = KMeans(num_experts, n_init=4, random_state=seed).fit(directions_TH)
    centres_EH = _balanced(directions_TH, _normalised(kmeans.cluster_centers_))
    logits_TE = states_TH @ centres_EH.T
    return centres_EH * _scale(logits_TE)


def _balanced(directions_TH: Floats, centres_EH: Floats) -> Floats:
    """Centres of what each gets when a price keeps every cluster to its share of the states."""
    from scipy.special import softmax

    for _ in range(5):
        logits_TE = directions_TH @ centres_EH.T / TEMPERATURE
        price_E = np.zeros(len(centres_EH), logits_TE.dtype)
        for _ in range(20):
            shares_TE = softmax(logits_TE - price_E, axis=1)
            price_E += np.log(shares_TE.mean(axis=0) * len(centres_EH))
        centres_EH = _normalised(shares_TE.T @ directions_TH)
    return centres_EH


def _scale(logits_TE: Floats) -> float:
    """Factor that brings the mean entropy of the softmax to `ENTROPY` of what it is at most."""
    if logits_TE.shape[1] == 1:
        return 1.0

    from scipy.optimize import brentq
    from scipy.special import logsumexp, softmax

    def excess(log_scale: float) -> float:
        scaled = np.exp(log_scale) * logits_TE
        entropy_T = logsumexp(scaled, axis=1) - (softmax(scaled, axis=1) * scaled).sum(axis=1)
        return float(entropy_T.mean() - ENTROPY * np.log(logits_TE.shape[1]))

    return float(np.exp(brentq(excess, -12.0, 12.0)))


def _normalised(rows: Floats) -> Floats:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(norms, np.finfo(rows.dtype).tiny)

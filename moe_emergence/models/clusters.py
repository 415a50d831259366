"""Routers that start at clusters of what they read; needs the extra `train`.

Letters: T tokens, H model width, E experts.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_emergence.models.mixture import MixtureModel
from moe_emergence.models.mode import evaluating
from moe_emergence.moe import TopKRouter

Floats = npt.NDArray[np.floating[Any]]

ENTROPY = 0.5
"""Mean entropy of the probabilities at the start, as a share of log E."""
RIDGE = 0.01
"""Penalty, in units of the mean square of a state's components."""
LARGEST_LOG_SCALE = 12.0
TEMPERATURE = 0.1
"""Of the transport, in units of the cosine between a state and a centre."""


@torch.no_grad()
def start_routers_at_clusters(
    model: MixtureModel, batches: Iterable[Tensor], *, seed: int = 0
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
        ValueError: for a hash router, fewer tokens than experts, and states too alike to cluster.
    """
    routers = _routers(model, "clusters")
    for index, states_TH in _router_inputs(model, routers, batches).items():
        weight_EH = routers[index].weight
        centres_EH = _centres(states_TH, len(weight_EH), seed + index)
        weight_EH.copy_(torch.from_numpy(_scaled(centres_EH, states_TH)))


@torch.no_grad()
def start_routers_at_domains(
    model: MixtureModel, batches: Mapping[str, Iterable[Tensor]], *, seed: int = 0
) -> None:
    """Tell every router the domains: the experts are shared out, and a linear map finds whose turn
    it is.

    Within each domain states are clustered as by `start_routers_at_clusters`, as many clusters as
    the domain has experts (the first domains have one more where E is no multiple of their number).
    The router is the ridge regression of a state on its cluster, in closed form (as the router of
    arXiv 2603.29765 on its branch). The positive control of tests for specialists: what it does not
    know of the domain, no linear router can.

    Args:
        model: with learned or frozen routers.
        batches: per domain, token ids (B, L) of training text.
        seed: of k-means.

    Raises:
        ValueError: for a hash router, fewer experts than domains, or too little text.
    """
    routers = _routers(model, "domains")
    read = [_router_inputs(model, routers, of_domain) for of_domain in batches.values()]
    for index, router in routers.items():
        experts = len(router.weight)
        if experts < len(read):
            raise ValueError(
                f"--router-init domains: {experts} experts for {len(read)} domains; raise "
                "--num-experts"
            )
        labels, first = [], 0
        for place, states in enumerate(read):
            share = experts // len(read) + (place < experts % len(read))
            centres = _centres(states[index], share, seed + index)
            labels.append(first + (_normalised(states[index]) @ centres.T).argmax(axis=1))
            first += share
        states_TH = np.concatenate([states[index] for states in read])
        weight_EH = _ridge(_normalised(states_TH), np.concatenate(labels), experts)
        router.weight.copy_(torch.from_numpy(_scaled(weight_EH, states_TH)))


def _ridge(directions_TH: Floats, labels_T: npt.NDArray[np.integer[Any]], experts: int) -> Floats:
    """(E, H) regression of the labels' indicators, every cluster of the same weight."""
    count_E = np.maximum(np.bincount(labels_T, minlength=experts), 1)
    weight_T = 1 / count_E[labels_T]
    moment_HH = (directions_TH * weight_T[:, None]).T @ directions_TH
    target_EH = np.zeros((experts, directions_TH.shape[1]))
    np.add.at(target_EH, labels_T, directions_TH * weight_T[:, None])
    penalty = RIDGE * np.trace(moment_HH) / len(moment_HH)
    solved: Floats = np.linalg.solve(moment_HH + penalty * np.eye(len(moment_HH)), target_EH.T).T
    return solved.astype(np.float32)


def _routers(model: MixtureModel, start: str) -> dict[int, TopKRouter]:
    routers: dict[int, TopKRouter] = {}
    for index, layer in model.moe_layers().items():
        if not isinstance(layer.router, TopKRouter):
            raise ValueError(
                f"--router-init {start}: the router of layer {index} has no weights to start; "
                "give another --router"
            )
        routers[index] = layer.router
    return routers


def _router_inputs(
    model: MixtureModel, routers: dict[int, TopKRouter], batches: Iterable[Tensor]
) -> dict[int, Floats]:
    """(T, H) fp32 inputs of every layer's router."""
    found: dict[int, list[Tensor]] = {index: [] for index in routers}

    def keeper(index: int) -> Any:
        return lambda module, inputs: found[index].append(inputs[0].float().cpu())

    hooks = [router.register_forward_pre_hook(keeper(i)) for i, router in routers.items()]
    try:
        with evaluating(model):
            for input_ids in batches:
                model(input_ids=input_ids.long().to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {index: torch.cat(parts).numpy() for index, parts in found.items()}


def _centres(states_TH: Floats, num_experts: int, seed: int) -> Floats:
    """(E, H) centres, of length 1, of balanced clusters of the states' directions."""
    from sklearn.cluster import KMeans  # a second to import

    if len(states_TH) < num_experts:
        raise ValueError(
            f"--router-init: {len(states_TH)} tokens to cluster for {num_experts} experts; give "
            "more text"
        )
    directions_TH = _normalised(states_TH)
    kmeans = KMeans(num_experts, n_init=4, random_state=seed).fit(directions_TH)
    return _balanced(directions_TH, _normalised(kmeans.cluster_centers_))


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


def _scaled(weight_EH: Floats, states_TH: Floats) -> Floats:
    """The weight times what brings the softmax to `ENTROPY` of the mean entropy it can have."""
    if len(weight_EH) == 1:
        return weight_EH
    logits_TE = states_TH @ weight_EH.T

    from scipy.optimize import brentq
    from scipy.special import logsumexp, softmax

    def excess(log_scale: float) -> float:
        scaled = np.exp(log_scale) * logits_TE
        entropy_T = logsumexp(scaled, axis=1) - (softmax(scaled, axis=1) * scaled).sum(axis=1)
        return float(entropy_T.mean() - ENTROPY * np.log(logits_TE.shape[1]))

    if excess(LARGEST_LOG_SCALE) > 0:
        raise ValueError(
            "--router-init: the clusters of the base's hidden states are all but one; train the "
            "base for longer (--pretrain-steps), or give --router-init random"
        )
    scaled_EH: Floats = weight_EH * np.exp(brentq(excess, -12.0, LARGEST_LOG_SCALE))
    return scaled_EH


def _normalised(rows: Floats) -> Floats:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(norms, np.finfo(rows.dtype).tiny)

"""Routers that start at clusters: they find what is there, evenly, neither flat nor sure."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score
from small_models import ids, make_dense, make_model
from torch import Tensor

from moe_emergence.data.samples import TOKENS_TO_CLUSTER, text_to_cluster
from moe_emergence.models import (
    start_routers_at_clusters,
    start_routers_at_domains,
    upcycle,
)
from moe_emergence.models.clusters import _centres, _scaled


def blobs(sizes: list[int], width: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """States around one direction each, of any length."""
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.normal(size=(width, len(sizes))))[0].T
    labels = np.repeat(np.arange(len(sizes)), sizes)
    states = centres[labels] + spread * rng.normal(size=(len(labels), width)) / width**0.5
    return (states * rng.uniform(2, 9, (len(labels), 1))).astype(np.float32), labels


def _router_weight(states: np.ndarray, experts: int, seed: int) -> np.ndarray:
    return _scaled(_centres(states, experts, seed), states)


def entropy(states: np.ndarray, weight: np.ndarray) -> float:
    probs = torch.from_numpy(states @ weight.T).double().softmax(dim=1)
    return float(torch.special.entr(probs).sum(dim=1).mean())


@settings(max_examples=15)
@given(st.integers(2, 6), st.integers(0, 1000))
def test_separate_clusters_are_found_whatever_the_lengths(clusters: int, seed: int) -> None:
    states, labels = blobs([200] * clusters, 16, 0.5, seed)
    weight = _router_weight(states, clusters, seed)
    assert adjusted_rand_score(labels, (states @ weight.T).argmax(axis=1)) > 0.95
    assert entropy(states, weight) == pytest.approx(math.log(clusters) / 2, rel=1e-3)
    assert np.linalg.norm(weight, axis=1) == pytest.approx(np.linalg.norm(weight[0]))


@pytest.mark.parametrize("seed", range(3))
def test_one_large_cluster_is_shared_out(seed: int) -> None:
    """Nine tenths of the states are one wide blob; k-means alone has loads from 0.4 to 1.3."""
    states, _ = blobs([3600, 200, 200], 16, 2.0, seed)
    load = np.bincount((states @ _router_weight(states, 8, seed).T).argmax(axis=1), minlength=8)
    assert load.max() < 1.2 * load.mean()
    assert load.min() > 0.8 * load.mean()


def batches(count: int = 12) -> list[Tensor]:
    return [ids(4, 12, seed) for seed in range(count)]


def test_routers_read_the_dense_models_states_and_are_repeatable() -> None:
    one, other, third = (upcycle(make_dense(), [1, 3], 4, 1, noise=0.0).train() for _ in range(3))
    experts = {n: p.clone() for n, p in one.named_parameters() if "router" not in n}
    start_routers_at_clusters(one, batches(), seed=3)
    start_routers_at_clusters(other, iter(batches()), seed=3)
    start_routers_at_clusters(third, batches(), seed=4)
    for index, layer in one.moe_layers().items():
        weight = layer.router.weight
        assert torch.equal(weight, other.moe_layers()[index].router.weight)
        assert not torch.equal(weight, third.moe_layers()[index].router.weight)
        assert weight.requires_grad
        assert not layer.router._forward_pre_hooks
    assert all(torch.equal(experts[n], p) for n, p in one.named_parameters() if n in experts)
    assert one.training
    dense, tokens = make_dense(), torch.cat(batches())
    read: list[Tensor] = []
    dense.transformer.h[3].ln_2.register_forward_hook(lambda *args: read.append(args[2]))
    with torch.no_grad():
        dense(input_ids=tokens)
    states = read[0].flatten(0, 1).numpy()
    again = _router_weight(states, 4, 3 + 3)
    assert np.allclose(one.moe_layers()[3].router.weight.detach().numpy(), again, atol=1e-3)


def test_a_frozen_router_starts_there_too_and_stays_frozen() -> None:
    model = upcycle(make_dense(), [1], 4, 1, router="frozen")
    before = model.moe_layers()[1].router.weight.clone()
    start_routers_at_clusters(model, batches())
    assert not torch.equal(before, model.moe_layers()[1].router.weight)
    assert "weight" not in dict(model.moe_layers()[1].router.named_parameters())


def test_one_expert_takes_all() -> None:
    model = upcycle(make_dense(), [1], 1, 1)
    start_routers_at_clusters(model, batches(1))
    assert model(input_ids=ids()).logits.isfinite().all()


def test_what_cannot_be_clustered_is_refused() -> None:
    with pytest.raises(ValueError, match="--router-init clusters: the router of layer 1 has no"):
        start_routers_at_clusters(make_model(router="hash"), batches())
    with pytest.raises(ValueError, match="--router-init: 2 tokens to cluster for 4 experts"):
        start_routers_at_clusters(make_model(), [ids(1, 2)])


def test_states_that_are_all_but_one_are_refused_with_what_to_change() -> None:
    rng = np.random.default_rng(0)
    states = (np.ones((400, 16)) + 1e-6 * rng.normal(size=(400, 16))).astype(np.float32)
    with pytest.raises(ValueError, match=r"all but one; .*--pretrain-steps.*--router-init random"):
        _router_weight(states, 4, 0)


@pytest.mark.parametrize("length", [16, 512])
def test_the_text_to_cluster_has_equal_parts(length: int) -> None:
    blocks = {d: torch.full((5000, length), n) for n, d in enumerate(("code", "math", "prose"))}
    found = text_to_cluster(blocks, 0)
    assert all((torch.cat(found[d]) == n).all() for n, d in enumerate(blocks))
    rows = torch.cat([torch.cat(found[d]) for d in found])
    parts = rows[:, 0].bincount()
    assert parts.unique().numel() == 1
    assert TOKENS_TO_CLUSTER * 0.9 <= rows.numel() <= TOKENS_TO_CLUSTER
    few = text_to_cluster({"code": blocks["code"][:2]}, 0)["code"]
    assert torch.cat(few).shape == (2, length)


def halves(rows: int) -> dict[str, list[Tensor]]:
    """Two domains of different tokens."""
    low, high = ids(rows, 12, 1) % 6, ids(rows, 12, 2) % 6 + 32
    return {"low": list(low.split(4)), "high": list(high.split(4))}


def test_a_router_told_the_domains_keeps_them_apart() -> None:
    model = upcycle(make_dense(), [1, 3], 5, 1, router="frozen").eval()
    start_routers_at_domains(model, halves(20), seed=1)
    for domain, experts in (("low", {0, 1, 2}), ("high", {3, 4})):
        fresh = torch.cat(halves(40)[domain])[20:]
        for decision in model(input_ids=fresh).router_decisions:
            inside = torch.isin(decision.topk_experts, torch.tensor(list(experts)))
            assert inside.float().mean() > 0.9
            assert set(decision.topk_experts.unique().tolist()) >= experts
    with pytest.raises(ValueError, match="--router-init domains: 1 experts for 2 domains"):
        start_routers_at_domains(upcycle(make_dense(), [1], 1, 1), halves(4))
    with pytest.raises(ValueError, match="--router-init domains: the router of layer 1 has no"):
        start_routers_at_domains(make_model(router="hash"), halves(4))

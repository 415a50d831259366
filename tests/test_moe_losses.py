"""Auxiliary losses against brute force, and the bugs their users have met elsewhere."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_emergence.moe import (
    RouterDecision,
    auxiliary_losses,
    load_balancing_loss,
    router_z_loss,
    routing_variance,
)


def random_routing(
    tokens: int, experts: int, top_k: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    probs = logits.softmax(dim=-1)
    return logits, probs, probs.topk(top_k, dim=-1).indices


def decision_of(logits: torch.Tensor, probs: torch.Tensor, chosen: torch.Tensor) -> RouterDecision:
    return RouterDecision(logits, probs, probs, chosen, torch.ones_like(chosen, dtype=probs.dtype))


def brute_force_balance(probs, chosen, keep) -> float:
    tokens = [t for t in range(len(probs)) if keep[t]]
    if not tokens:
        return 0.0
    total = 0.0
    experts, top_k = probs.shape[1], chosen.shape[1]
    for e in range(experts):
        assignments = sum(int(chosen[t, k]) == e for t in tokens for k in range(top_k))
        mean_prob = sum(float(probs[t, e]) for t in tokens) / len(tokens)
        total += assignments / (len(tokens) * top_k) * mean_prob
    return experts * total


SHAPES = st.tuples(st.integers(0, 25), st.integers(1, 7)).flatmap(
    lambda te: st.tuples(st.just(te[0]), st.just(te[1]), st.integers(1, te[1]))
)


@given(SHAPES, st.integers(0, 1000), st.data())
@settings(max_examples=40)
def test_both_losses_match_brute_force_and_a_mask_drops_tokens(shape, seed, data) -> None:
    tokens = shape[0]
    logits, probs, chosen = random_routing(*shape, seed)
    keep = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    mask = torch.tensor(keep, dtype=torch.bool)
    expected = brute_force_balance(probs, chosen, keep)
    squares = [math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits[mask].tolist()]
    expected_z = sum(squares) / max(len(squares), 1)
    for kind in (torch.bool, torch.int64, torch.float32):
        masked = load_balancing_loss(probs, chosen, mask.to(kind))
        assert masked.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert router_z_loss(logits, mask.to(kind)).item() == pytest.approx(expected_z, rel=1e-12)
    dropped = load_balancing_loss(probs[mask], chosen[mask])
    assert dropped.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert router_z_loss(logits[mask]).item() == pytest.approx(expected_z, rel=1e-12)


@given(SHAPES, st.integers(0, 1000))
@settings(max_examples=25)
def test_the_order_of_tokens_and_the_names_of_experts_do_not_matter(shape, seed) -> None:
    tokens, experts, _ = shape
    logits, probs, chosen = random_routing(*shape, seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(tokens, generator=generator)
    rename = torch.randperm(experts, generator=generator)
    loss = load_balancing_loss(probs, chosen)
    torch.testing.assert_close(load_balancing_loss(probs[order], chosen[order]), loss)
    renamed = torch.empty_like(probs)
    renamed[:, rename] = probs
    torch.testing.assert_close(load_balancing_loss(renamed, rename[chosen]), loss)
    torch.testing.assert_close(router_z_loss(logits[order]), router_z_loss(logits))


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_uniform_routing_is_one_for_every_k(top_k) -> None:
    experts = 8
    probs = torch.full((experts * 3, experts), 1 / experts, dtype=torch.float64)
    start = torch.arange(experts * 3) % experts
    chosen = (start[:, None] + torch.arange(top_k)) % experts
    assert load_balancing_loss(probs, chosen).item() == pytest.approx(1.0, rel=1e-14)


@pytest.mark.parametrize("experts", [1, 2, 8])
def test_collapse_on_one_expert_is_e(experts) -> None:
    chosen = torch.full((30, 1), experts - 1)
    probs = torch.zeros(30, experts, dtype=torch.float64).scatter(1, chosen, 1.0)
    assert load_balancing_loss(probs, chosen).item() == pytest.approx(experts, rel=1e-14)


def test_the_gradient_goes_through_the_probabilities_only() -> None:
    _, probs, chosen = random_routing(20, 5, 2, 1)
    probs.requires_grad_()
    keep = torch.arange(20) % 3 > 0
    loss = load_balancing_loss(probs, chosen, keep)
    (gradient,) = torch.autograd.grad(1.7 * loss, probs)
    fractions = torch.bincount(chosen[keep].flatten(), minlength=5) / (keep.sum() * 2)
    expected = 1.7 * 5 * fractions.double() / keep.sum() * keep[:, None]
    torch.testing.assert_close(gradient, expected)
    assert (gradient[~keep] == 0).all()


def test_the_z_loss_gradient() -> None:
    logits, _, _ = random_routing(6, 4, 1, 2)
    mask = torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda v: router_z_loss(v, mask), logits.requires_grad_())


@given(
    st.integers(1, 5),
    st.integers(1, 8),
    st.integers(2, 6),
    st.integers(0, 1000),
    st.data(),
)
@settings(max_examples=30)
def test_with_the_global_fraction_equal_parts_average_to_the_whole(
    parts, size, experts, seed, data
) -> None:
    """So micro-batches and processes change neither the loss nor its gradient."""
    top_k = data.draw(st.integers(1, experts))
    _, probs, chosen = random_routing(parts * size, experts, top_k, seed)
    order = torch.randperm(parts * size, generator=torch.Generator().manual_seed(seed))
    whole, split = probs.clone().requires_grad_(), probs.clone().requires_grad_()
    loss = load_balancing_loss(whole, chosen)
    fraction = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
    pieces = [
        load_balancing_loss(split[index], chosen[index], expert_fraction_E=fraction.double())
        for index in order.split(size)
    ]
    mean = torch.stack(pieces).mean()
    torch.testing.assert_close(mean, loss)
    torch.testing.assert_close(
        torch.autograd.grad(mean, split)[0], torch.autograd.grad(loss, whole)[0]
    )


def test_with_a_mask_and_the_global_fraction_equal_kept_parts_average_to_the_whole() -> None:
    _, probs, chosen = random_routing(24, 5, 2, 3)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[:, 4:] = False
    mask[1] = mask[1].flip(0)
    mask = mask.flatten()
    whole = load_balancing_loss(probs, chosen, mask)
    fraction = torch.bincount(chosen[mask].flatten(), minlength=5) / chosen[mask].numel()
    parts = [
        load_balancing_loss(probs[i : i + 6], chosen[i : i + 6], mask[i : i + 6], fraction)
        for i in range(0, 24, 6)
    ]
    # the fraction is fp32 here
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-6, atol=0)


@given(SHAPES, st.integers(0, 1000), st.data())
@settings(max_examples=40)
def test_the_routing_variance_is_the_mean_of_the_experts_variances(shape, seed, data) -> None:
    tokens = shape[0]
    routings = [random_routing(*shape, seed + layer) for layer in range(2)]
    mask = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)), dtype=torch.bool
    )
    found = routing_variance([decision_of(*routing) for routing in routings], mask)
    experts = [p[mask][:, e].tolist() for _, p, _ in routings for e in range(shape[1])]
    expected = [statistics.pvariance(column) if column else 0.0 for column in experts]
    assert found.item() == pytest.approx(statistics.fmean(expected), rel=1e-9, abs=1e-15)
    dropped = [decision_of(*(part[mask] for part in routing)) for routing in routings]
    torch.testing.assert_close(routing_variance(dropped), found, rtol=1e-12, atol=1e-15)


def test_the_routing_variance_is_0_for_one_way_and_most_where_all_are_sure() -> None:
    same = torch.tensor([[0.7, 0.1, 0.1, 0.1]], dtype=torch.float64).expand(12, 4)
    sure = torch.eye(4, dtype=torch.float64).repeat(3, 1)
    for probs, expected in ((same, 0.0), (sure, 3 / 16)):
        decision = decision_of(probs.log(), probs, probs.topk(1).indices)
        assert routing_variance([decision]).item() == pytest.approx(expected, abs=1e-15)


@given(st.integers(2, 4), st.integers(1, 6), st.integers(1, 7), st.integers(0, 1000))
@settings(max_examples=30)
def test_with_the_global_means_equal_parts_average_to_the_whole_variance(
    parts, size, experts, seed
) -> None:
    """Gradient included, though the means are constants for it: see the docstring of the loss."""
    _, probs, chosen = random_routing(parts * size, experts, 1, seed)
    whole, split = probs.clone().requires_grad_(), probs.clone().requires_grad_()
    variance = routing_variance([decision_of(whole, whole, chosen)])
    means = [probs.mean(dim=0)]
    pieces = [
        routing_variance([decision_of(split[i], split[i], chosen[i])], None, means)
        for i in torch.arange(parts * size).split(size)
    ]
    mean = torch.stack(pieces).mean()
    torch.testing.assert_close(mean, variance, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(
        torch.autograd.grad(mean, split)[0],
        torch.autograd.grad(variance, whole)[0],
        rtol=1e-9,
        atol=1e-15,
    )


@pytest.mark.parametrize("tokens", [0, 6], ids=["no-tokens", "all-masked"])
def test_nothing_that_counts_is_zero_without_nan(tokens) -> None:
    logits, _, chosen = random_routing(tokens, 4, 2, 4)
    logits.requires_grad_()
    mask = torch.zeros(tokens, dtype=torch.bool)
    losses = [
        load_balancing_loss(logits.softmax(-1), chosen, mask),
        load_balancing_loss(logits.softmax(-1), chosen, mask, torch.full((4,), 0.25)),
        router_z_loss(logits, mask),
        routing_variance([decision_of(logits, logits.softmax(-1), chosen)], mask),
    ]
    for loss in losses:
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert (gradient == 0).all()


def test_opposite_imbalances_of_two_layers_do_not_cancel() -> None:
    """transformers 31464: concatenated layers hide collapse."""
    one_sided = []
    for expert in (0, 1):
        chosen = torch.full((10, 1), expert)
        probs = torch.full((10, 2), 0.1, dtype=torch.float64).scatter(1, chosen, 0.9)
        one_sided.append(decision_of(probs.log(), probs, chosen))
    balance, _ = auxiliary_losses(one_sided)
    assert balance.item() == pytest.approx(1.8)
    joined = load_balancing_loss(
        torch.cat([d.router_probs for d in one_sided]),
        torch.cat([d.topk_experts for d in one_sided]),
    )
    assert joined.item() == pytest.approx(1.0)


def test_layers_are_averaged_with_their_own_mask_and_fraction() -> None:
    mask = torch.arange(12) % 4 != 1
    routings = [random_routing(12, 4, 2, seed) for seed in (5, 6, 7)]
    fractions = [torch.tensor(f) for f in ([0.1, 0.2, 0.3, 0.4], [1.0, 0, 0, 0], [0.25] * 4)]
    decisions = [decision_of(*routing) for routing in routings]
    balance, z = auxiliary_losses(decisions, mask, fractions)
    expected = [
        float(4 * (f * p[mask].mean(0)).sum())
        for (_, p, _), f in zip(routings, fractions, strict=True)
    ]
    assert balance.item() == pytest.approx(sum(expected) / 3, rel=1e-6)
    expected = [float(v[mask].logsumexp(-1).square().mean()) for v, _, _ in routings]
    assert z.item() == pytest.approx(sum(expected) / 3, rel=1e-12)
    with pytest.raises(ValueError, match="shorter"):
        auxiliary_losses(decisions, mask, fractions[:2])


def test_no_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        auxiliary_losses([])


def test_autocast_changes_neither_loss() -> None:
    logits, _, chosen = random_routing(300, 8, 2, 8)
    logits = 5 * logits.float()
    decision = decision_of(logits, logits.softmax(-1), chosen)
    mask = torch.arange(300) % 5 > 0
    plain = auxiliary_losses([decision], mask)
    with torch.autocast("cpu", torch.bfloat16):
        auto = auxiliary_losses([decision], mask)
    for a, b in zip(plain, auto, strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)


def test_large_logits_do_not_overflow() -> None:
    logits = torch.full((3, 4), 1e4)
    assert router_z_loss(logits).item() == pytest.approx((1e4 + math.log(4)) ** 2, rel=1e-6)

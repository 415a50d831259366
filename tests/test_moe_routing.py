"""Routers: the choice of experts, its weights and the gradients that reach the router."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_emergence.moe import HashRouter, MoELayer, RouterDecision, RouterNoise, TopKRouter
from moe_emergence.moe.dispatch import get_dispatcher

NOISE = RouterNoise(std=1.0, seed=3, step=5)


def make_router(
    hidden: int = 6,
    experts: int = 5,
    top_k: int = 2,
    *,
    seed: int = 0,
    frozen: bool = False,
    use_expert_bias: bool = False,
) -> TopKRouter:
    router = TopKRouter(hidden, experts, top_k, frozen=frozen, use_expert_bias=use_expert_bias)
    with torch.no_grad():
        router.weight.copy_(torch.randn(experts, hidden, generator=seeded(seed)))
    return router


def tensors_of(decision: RouterDecision) -> list[torch.Tensor]:
    """Everything a decision of a learned router holds, its sums included."""
    values = [*vars(decision).values(), *vars(decision.sums).values()]
    return [value for value in values if torch.is_tensor(value)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def router_with_logits(logits_TE: torch.Tensor, top_k: int) -> tuple[TopKRouter, torch.Tensor]:
    """A router, and an input that makes it produce these logits (identity weight)."""
    experts = logits_TE.shape[1]
    router = TopKRouter(experts, experts, top_k).to(logits_TE.dtype)
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
    return router, logits_TE


@given(
    tokens=st.integers(0, 30),
    hidden=st.integers(1, 9),
    experts=st.integers(1, 9),
    data=st.data(),
)
@settings(max_examples=40)
def test_a_decision_matches_a_loop_over_tokens(tokens, hidden, experts, data) -> None:
    top_k = data.draw(st.integers(1, experts), label="top_k")
    x_TH = torch.randn(tokens, hidden, generator=seeded(tokens), dtype=torch.float64)
    router = make_router(hidden, experts, top_k, seed=hidden).double()
    decision = router(x_TH)
    assert decision.num_experts == experts
    for field in (decision.router_logits, decision.router_probs, decision.noisy_probs):
        assert field.shape == (tokens, experts)
    assert decision.topk_experts.shape == decision.topk_weights.shape == (tokens, top_k)
    assert decision.topk_experts.dtype == torch.int64
    weight = router.weight.detach().numpy()
    for t in range(tokens):
        logits = weight @ x_TH[t].numpy()
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        best = sorted(range(experts), key=lambda e: (-probs[e], e))[:top_k]
        assert decision.topk_experts[t].tolist() == best
        chosen = np.ones(1) if top_k == 1 else probs[best] / probs[best].sum()
        np.testing.assert_allclose(decision.topk_weights[t].detach().numpy(), chosen, rtol=1e-12)
        np.testing.assert_allclose(decision.router_probs[t].detach().numpy(), probs, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("std", [0.0, 3.0], ids=["quiet", "noisy"])
def test_top_1_weights_are_exactly_one_and_top_k_weights_sum_to_one(dtype, std) -> None:
    x_TH = 20 * torch.randn(500, 6, generator=seeded(1), dtype=dtype)
    noise = dataclasses.replace(NOISE, std=std)
    one = make_router(top_k=1).to(dtype)(x_TH, noise).topk_weights
    assert torch.equal(one, torch.ones(500, 1, dtype=dtype))
    for top_k in (2, 5):
        weights = make_router(top_k=top_k).to(dtype)(x_TH, noise).topk_weights
        sums = weights.sum(dim=1)
        assert (weights >= 0).all()
        # K correctly rounded quotients: half an ulp each, and K - 1 additions
        assert (sums - 1).abs().max() <= top_k * torch.finfo(dtype).eps


@pytest.mark.parametrize("std", [0.0, 0.7], ids=["quiet", "noisy"])
def test_top_1_is_straight_through(std) -> None:
    """The gradient of the weight is that of the chosen (noisy) probability."""
    router = make_router(top_k=1).double()
    noise = dataclasses.replace(NOISE, std=std)
    x_TH = torch.randn(40, 6, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(40, 1, generator=seeded(3), dtype=torch.float64)
    decision = router(x_TH, noise)
    ours = torch.autograd.grad(decision.topk_weights, [x_TH, router.weight], upstream)
    # softmax derivative by hand: dp_e/dlogit_j = p_e (delta_ej - p_j)
    probs, chosen = decision.noisy_probs.detach(), decision.topk_experts[:, 0]
    onehot = torch.nn.functional.one_hot(chosen, 5).double()
    dlogits = upstream * probs.gather(1, chosen[:, None]) * (onehot - probs)
    torch.testing.assert_close(ours[0], dlogits @ router.weight.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours[1], dlogits.T @ x_TH.detach(), rtol=1e-10, atol=1e-12)
    assert ours[1].abs().max() > 1e-2  # renormalised top-1 would give 0 (minimind 858)


@pytest.mark.parametrize("std", [0.0, 0.7], ids=["quiet", "noisy"])
def test_a_probability_weight_is_the_chosen_probability_with_its_gradient(std) -> None:
    plain = TopKRouter(6, 5, 1, top1_weight="probability").double()
    through = TopKRouter(6, 5, 1).double()
    through.load_state_dict(plain.state_dict())
    noise = dataclasses.replace(NOISE, std=std)
    x_TH = 20 * torch.randn(40, 6, generator=seeded(2), dtype=torch.float64)
    x_TH.requires_grad_()
    upstream = torch.randn(40, 1, generator=seeded(3), dtype=torch.float64)
    decision, reference = plain(x_TH, noise), through(x_TH, noise)
    assert torch.equal(decision.topk_experts, reference.topk_experts)
    chosen = reference.noisy_probs.gather(1, reference.topk_experts)
    assert torch.equal(decision.topk_weights, chosen)
    ours = torch.autograd.grad(decision.topk_weights, [x_TH, plain.weight], upstream)
    theirs = torch.autograd.grad(reference.topk_weights, [x_TH, through.weight], upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert ours[1].abs().max() > 1e-2


def test_paths_agree_on_probability_weights() -> None:
    layer = MoELayer(8, 16, 4, 1, top1_weight="probability").double()
    x_TH = torch.randn(30, 8, generator=seeded(6), dtype=torch.float64)
    results = []
    for name in ("sequential", "fused"):
        layer.dispatch = name
        layer.zero_grad()
        y_TH, _ = layer(x_TH)
        y_TH.square().sum().backward()
        results.append([y_TH.detach(), *(p.grad.clone() for p in layer.parameters())])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert results[0][0].abs().max() > 0


@pytest.mark.parametrize("top_k", [2, 3, 5], ids=["two", "three", "all"])
def test_renormalised_weights_are_a_softmax_over_the_chosen(top_k) -> None:
    """p_k / sum of chosen p is the softmax of the chosen logits: an independent derivative."""
    router = make_router(top_k=top_k).double()
    x_TH = torch.randn(40, 6, generator=seeded(4), dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(40, top_k, generator=seeded(5), dtype=torch.float64)
    decision = router(x_TH)
    ours = torch.autograd.grad(decision.topk_weights, [x_TH, router.weight], upstream)
    weights = (x_TH @ router.weight.T).gather(1, decision.topk_experts).softmax(dim=1)
    theirs = torch.autograd.grad(weights, [x_TH, router.weight], upstream)
    torch.testing.assert_close(decision.topk_weights, weights, rtol=1e-12, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2])
def test_noise_acts_in_training_only_and_leaves_the_clean_probabilities(top_k) -> None:
    router = make_router(top_k=top_k)
    x_TH = torch.randn(200, 6, generator=seeded(6))
    clean = router.eval()(x_TH)
    quiet = [
        router.eval()(x_TH, NOISE),
        router.train()(x_TH, None),
        router.train()(x_TH, dataclasses.replace(NOISE, std=0.0)),
    ]
    for decision in quiet:
        for ours, theirs in zip(tensors_of(decision), tensors_of(clean), strict=True):
            assert torch.equal(ours, theirs)
    noisy = router.train()(x_TH, NOISE)
    assert torch.equal(noisy.router_logits, clean.router_logits)
    assert torch.equal(noisy.router_probs, clean.router_probs)
    assert not torch.equal(noisy.noisy_probs, clean.noisy_probs)
    assert not torch.equal(noisy.topk_experts, clean.topk_experts)
    # the choice and the weights come from the noisy probabilities
    best = noisy.noisy_probs.topk(top_k, dim=1)
    assert torch.equal(noisy.topk_experts, best.indices)
    if top_k > 1:
        expected = best.values / best.values.sum(dim=1, keepdim=True)
        torch.testing.assert_close(noisy.topk_weights, expected)


@pytest.mark.parametrize("top_k", [1, 2, 3, 6])
@pytest.mark.parametrize("experts", [6, 64], ids=["6-experts", "64-experts"])
def test_ties_go_to_the_lower_index(top_k, experts) -> None:
    router, x_TE = router_with_logits(torch.zeros(33, experts), top_k)
    assert router(x_TE).topk_experts.tolist() == [list(range(top_k))] * 33
    tied = torch.zeros(7, experts)
    tied[:, 2] = tied[:, 5] = 1.0
    expected = ([2, 5] + [e for e in range(experts) if e not in (2, 5)])[:top_k]
    assert router(tied).topk_experts.tolist() == [expected] * 7


@pytest.mark.parametrize("top_k", [1, 3])
def test_no_tokens_give_an_empty_decision(top_k) -> None:
    decision = make_router(top_k=top_k)(torch.zeros(0, 6), NOISE)
    assert decision.topk_experts.shape == decision.topk_weights.shape == (0, top_k)
    assert decision.expert_counts().tolist() == [0] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_router_computes_in_fp32_whatever_the_autocast(dtype) -> None:
    router = make_router(top_k=2)
    x_TH = torch.randn(50, 6, generator=seeded(7)).to(dtype)
    plain = router(x_TH)
    with torch.autocast("cpu", torch.bfloat16):
        auto = router(x_TH)
    for ours, theirs in zip(tensors_of(plain), tensors_of(auto), strict=True):
        assert torch.equal(ours, theirs)
    assert plain.router_logits.dtype == plain.topk_weights.dtype == torch.float32
    exact = x_TH.double() @ router.weight.detach().double().T
    # inner products of length 6 in fp32: at most 6 roundings of |x||w|
    bound = (
        6 * torch.finfo(torch.float32).eps * (x_TH.double().abs() @ router.weight.abs().T.double())
    )
    assert ((plain.router_logits - exact).abs() <= bound).all()


def test_a_bf16_router_computes_in_fp32() -> None:
    router = make_router().bfloat16()
    decision = router(torch.randn(9, 6, generator=seeded(8)).bfloat16())
    assert decision.router_logits.dtype == decision.topk_weights.dtype == torch.float32


def test_fp64_stays_fp64() -> None:
    decision = make_router().double()(torch.randn(9, 6, dtype=torch.float64), NOISE)
    for field in ("router_logits", "router_probs", "noisy_probs", "topk_weights"):
        assert getattr(decision, field).dtype == torch.float64


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_frozen_router_neither_takes_nor_gives_gradient(top_k) -> None:
    router = make_router(top_k=top_k, frozen=True)
    assert not list(router.parameters())  # a buffer: nothing can make it trainable
    assert set(router.state_dict()) == {"weight"}
    x_TH = torch.randn(10, 6, generator=seeded(9), requires_grad=True)
    decision = router(x_TH, NOISE)
    assert not any(tensor.requires_grad for tensor in tensors_of(decision))
    learned = make_router(top_k=top_k)(x_TH, NOISE)
    assert torch.equal(decision.topk_experts, learned.topk_experts)


def test_a_layer_with_a_frozen_router_sends_gradient_through_the_experts_only() -> None:
    x_TH = torch.randn(10, 6, generator=seeded(10), requires_grad=True)
    layer = MoELayer(6, 7, 3, 2, router="frozen")
    y_TH, _ = layer(x_TH)
    y_TH.backward(torch.randn(10, 6, generator=seeded(11)))
    assert x_TH.grad is not None
    assert x_TH.grad.abs().max() > 0


class TestHashRouter:
    def test_it_depends_on_the_token_id_alone(self) -> None:
        router = HashRouter(8, 3)
        ids = torch.tensor([4, 9, 4, 50_256, 9, 0])
        a = router(torch.randn(6, 4), NOISE, ids)
        b = router.train()(torch.randn(6, 4), None, ids.flip(0))
        assert torch.equal(a.topk_experts, b.topk_experts.flip(0))
        assert torch.equal(a.topk_experts[0], a.topk_experts[2])

    @pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (8, 2), (5, 5), (6, 3), (1, 1)])
    def test_experts_are_distinct_balanced_and_equally_weighted(self, experts, top_k) -> None:
        ids = torch.arange(50_257)
        decision = HashRouter(experts, top_k, layer=2)(torch.zeros(len(ids), 2), None, ids)
        ordered = decision.topk_experts.sort(dim=1).values
        assert ((ordered >= 0) & (ordered < experts)).all()
        assert (ordered[:, 1:] > ordered[:, :-1]).all()
        assert torch.equal(decision.topk_weights, torch.full((len(ids), top_k), 1 / top_k))
        # binomial counts: 6 standard deviations
        p = top_k / experts
        spread = 6 * math.sqrt(len(ids) * p * (1 - p))
        counts = decision.expert_counts().double()
        assert (counts - len(ids) * p).abs().max() <= spread
        expected = torch.zeros(len(ids), experts).scatter(1, decision.topk_experts, 1 / top_k)
        assert torch.equal(decision.router_probs, expected)

    @pytest.mark.parametrize("experts", [2, 8, 6, 64])
    def test_layers_group_tokens_independently(self, experts) -> None:
        """Tokens that share an expert in one layer must not all share one in the next."""
        ids = torch.arange(50_257)
        first, second = (
            HashRouter(experts, 1, layer=layer)(torch.zeros(len(ids), 2), None, ids)
            .topk_experts[:, 0]
            .numpy()
            for layer in (3, 4)
        )
        joint = np.zeros((experts, experts))
        np.add.at(joint, (first, second), 1)
        joint /= joint.sum()
        independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        seen = joint > 0
        information = (joint[seen] * np.log(joint[seen] / independent[seen])).sum()
        # 2 N I is chi-square with (E-1)^2 degrees of freedom when independent: mean + 6 sigma
        freedom = (experts - 1) ** 2
        assert 2 * len(ids) * information <= freedom + 6 * math.sqrt(2 * freedom)

    def test_it_needs_token_ids(self) -> None:
        with pytest.raises(ValueError, match=r"hash router needs token_ids.*input_ids"):
            HashRouter(4, 1)(torch.zeros(3, 2))

    def test_it_has_nothing_to_save_or_train(self) -> None:
        router = HashRouter(4, 2)
        assert not router.state_dict()
        assert not list(router.parameters())


class TestExpertBias:
    @pytest.mark.parametrize("top_k", [1, 2])
    def test_it_moves_the_selection_and_nothing_else(self, top_k) -> None:
        x_TH = torch.randn(60, 6, generator=seeded(12))
        router = make_router(top_k=top_k, use_expert_bias=True)
        plain = router(x_TH)
        router.expert_bias += torch.tensor([0.0, 0.0, 5.0, 0.0, 0.0])
        biased = router(x_TH)
        assert torch.equal(plain.router_logits, biased.router_logits)
        assert torch.equal(plain.router_probs, biased.router_probs)
        assert (biased.topk_experts[:, 0] == 2).all()
        assert not torch.equal(plain.topk_experts, biased.topk_experts)
        chosen = biased.router_probs.gather(1, biased.topk_experts)
        expected = torch.ones(60, 1) if top_k == 1 else chosen / chosen.sum(1, keepdim=True)
        torch.testing.assert_close(biased.topk_weights, expected)

    def test_the_update_lifts_the_idle_and_lowers_the_busy(self) -> None:
        router = make_router(experts=4, use_expert_bias=True)
        router.update_expert_bias(torch.tensor([10, 0, 5, 5]), rate=0.01)
        torch.testing.assert_close(router.expert_bias, torch.tensor([-0.01, 0.01, 0.0, 0.0]))
        router.update_expert_bias(torch.tensor([8, 8, 0, 0]), rate=0.01)
        torch.testing.assert_close(router.expert_bias, torch.tensor([-0.02, 0.0, 0.01, 0.01]))

    def test_repeated_updates_balance_a_collapsed_router(self) -> None:
        x_TH = torch.randn(2000, 6, generator=seeded(13))
        x_TH[:, 0] += 3
        router = make_router(experts=4, top_k=1, use_expert_bias=True)
        with torch.no_grad():
            router.weight *= 0.3  # scores spread over [0, 1] rather than saturated
        before = router(x_TH).expert_counts().max()
        for _ in range(400):
            router.update_expert_bias(router(x_TH).expert_counts(), rate=0.005)
        after = router(x_TH).expert_counts()
        assert before > 1000
        assert after.max() < 600

    def test_it_is_a_buffer_without_gradient(self) -> None:
        router = make_router(use_expert_bias=True)
        assert set(router.state_dict()) == {"weight", "expert_bias"}
        assert [name for name, _ in router.named_parameters()] == ["weight"]
        assert set(make_router().state_dict()) == {"weight"}

    def test_updating_a_router_without_it_is_refused(self) -> None:
        with pytest.raises(ValueError, match="use_expert_bias"):
            make_router().update_expert_bias(torch.ones(5), 0.1)


@pytest.mark.parametrize("top_k", [0, -1, 6], ids=["zero", "negative", "more-than-experts"])
@pytest.mark.parametrize("kind", ["learned", "frozen", "hash"])
def test_top_k_outside_the_experts_is_refused(kind, top_k) -> None:
    with pytest.raises(ValueError, match=rf"top_k {top_k}: .* from 1 to num_experts \(5\)"):
        MoELayer(4, 4, 5, top_k, router=kind)


def test_an_unknown_router_is_refused_not_replaced_by_a_learned_one() -> None:
    with pytest.raises(ValueError, match="hashed"):
        MoELayer(4, 4, 5, 1, router="hashed")


def test_a_decision_is_frozen() -> None:
    decision = make_router()(torch.zeros(2, 6))
    with pytest.raises(dataclasses.FrozenInstanceError):
        decision.topk_experts = decision.topk_experts + 1  # type: ignore[misc]


@given(tokens=st.integers(0, 30), experts=st.integers(1, 7), data=st.data())
@settings(max_examples=30)
def test_expert_counts_match_numpy(tokens, experts, data) -> None:
    top_k = data.draw(st.integers(1, experts))
    keep = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    decision = make_router(6, experts, top_k)(torch.randn(tokens, 6, generator=seeded(14)))
    chosen = decision.topk_experts.numpy()
    counts = decision.expert_counts()
    assert counts.dtype == torch.int64
    assert counts.tolist() == np.bincount(chosen.ravel(), minlength=experts).tolist()
    expected = np.bincount(chosen[np.array(keep, bool)].ravel(), minlength=experts).tolist()
    for dtype in (torch.bool, torch.int64, torch.float32):
        mask_T = torch.tensor(keep, dtype=torch.bool).to(dtype)
        assert decision.expert_counts(mask_T).tolist() == expected


def test_entropy_is_that_of_the_clean_probabilities() -> None:
    router = make_router(experts=5)
    x_TH = torch.randn(50, 6, generator=seeded(15))
    decision = router.train()(x_TH, NOISE)
    probs = decision.router_probs.detach().double().numpy()
    expected = -(probs * np.log(probs)).sum(axis=1).mean()
    assert decision.entropy().item() == pytest.approx(expected, rel=1e-5)
    assert not decision.entropy().requires_grad


@pytest.mark.parametrize(
    ("logits", "entropy"),
    [(torch.zeros(3, 8), math.log(8)), (1000 * torch.eye(8), 0.0)],
    ids=["uniform", "certain-without-nan"],
)
def test_entropy_at_its_ends(logits, entropy) -> None:
    router, x_TE = router_with_logits(logits, 1)
    assert router(x_TE).entropy().item() == pytest.approx(entropy, abs=1e-6)


def test_the_path_of_a_layer_can_be_assigned_by_name_or_as_it_is() -> None:
    layer = MoELayer(4, 8, 3, 1, dispatch="sequential")
    assert type(layer.dispatch) is type(get_dispatcher("sequential"))
    layer.dispatch = "grouped"
    assert type(layer.experts.dispatcher) is type(get_dispatcher("grouped"))
    layer.dispatch = own = get_dispatcher("fused")
    assert layer.experts.dispatcher is own
    with pytest.raises(ValueError, match="dispatch quick: choose from auto, sequential"):
        layer.dispatch = "quick"
    assert layer.experts.dispatcher is own
    assert not any("dispatch" in name for name in layer.state_dict())


def test_an_activation_that_experts_do_not_have_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="activation 'relu': choose from gelu_tanh, swiglu"):
        MoELayer(4, 8, 3, 1, activation="relu")

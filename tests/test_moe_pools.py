"""Document pools: what was read of a document decides which experts its tokens choose among."""

import dataclasses
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models import make_mixture
from small_models import ids, make_dense, make_model

from moe_emergence.analysis.counts import Batch, LayerCounts, null_weights
from moe_emergence.analysis.routers import RouterReader
from moe_emergence.config import ModelConfig
from moe_emergence.models import MoEGPT2LMHeadModel, upcycle
from moe_emergence.models.export import to_transformers
from moe_emergence.models.pruning import keep_experts
from moe_emergence.moe import MoELayer, RouterNoise
from moe_emergence.moe.pools import DocumentPools

END = 0
NOISE = RouterNoise(std=0.5, seed=3, step=9)


def check_by_hand(
    pools: list[set[int]],
    logits_TE: torch.Tensor,
    ids_BL: torch.Tensor,
    size_of: dict[tuple[int, int], int],
) -> None:
    """Every token's pool against exact sums, token by token.

    The size is that of the document's first token. Nobody outside may have more than somebody
    inside, but for 1e-12 of it: two sums that are equal after rounding have no order.
    """
    probs_BLE = logits_TE.double().softmax(dim=1).view(*ids_BL.shape, -1).tolist()
    length = ids_BL.shape[1]
    for row, tokens in enumerate(ids_BL.tolist()):
        begin = 0
        for place in range(length):
            if place and tokens[place - 1] == END:
                begin = place
            seen = probs_BLE[row][begin : place + 1]
            sums = [sum(map(Fraction, probs)) for probs in zip(*seen, strict=True)]
            pool = pools[row * length + place]
            assert len(pool) == size_of[row, begin]
            least = min(sums[e] for e in pool)
            outside = [x for e, x in enumerate(sums) if e not in pool]
            assert all(x <= least * (1 + Fraction(1, 10**12)) for x in outside)


def pools_in(limited_TE: torch.Tensor) -> list[set[int]]:
    return [{e for e, x in enumerate(row) if x > -5000} for row in limited_TE.tolist()]


@st.composite
def texts(draw) -> tuple[torch.Tensor, torch.Tensor, int]:
    rows, length, experts = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 14)),
        draw(st.integers(1, 7)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    token_ids = torch.randint(0, 4, (rows, length), generator=generator)
    logits = draw(st.sampled_from([0.1, 1.0, 10.0, 30.0])) * torch.randn(
        rows * length, experts, generator=generator
    )
    return logits, token_ids, draw(st.integers(1, experts))


@given(texts())
@settings(max_examples=100)
def test_pools_are_those_of_a_loop_over_tokens(text) -> None:
    logits_TE, ids_BL, size = text
    limited_TE = DocumentPools(size, (END,)).limit(logits_TE, ids_BL, None)
    sizes = {(b, i): size for b in range(len(ids_BL)) for i in range(ids_BL.shape[1])}
    pools = pools_in(limited_TE)
    check_by_hand(pools, logits_TE, ids_BL, sizes)
    for limited, logits, pool in zip(limited_TE, logits_TE, pools, strict=True):
        inside = sorted(pool)
        assert torch.equal(limited[inside], logits[inside])
        probs = torch.zeros_like(limited)
        probs[inside] = logits[inside].softmax(dim=0)
        torch.testing.assert_close(limited.softmax(dim=0), probs, rtol=1e-6, atol=0)


@given(texts(), texts())
@settings(max_examples=60)
def test_a_document_has_the_pools_it_would_have_alone(text, other) -> None:
    """Bitwise: also where the sums of all its experts but one are below the rounding of others."""
    logits_TE, ids_BL, size = text
    length, experts = ids_BL.shape[1], logits_TE.shape[1]
    alone_TE = DocumentPools(size).limit(logits_TE[:length], ids_BL[:1] | 1, None)
    before_TE = other[0][:, torch.arange(experts) % other[0].shape[1]]
    before_1B = torch.ones(1, len(before_TE), dtype=torch.long)
    before_1B[0, -1] = END
    both_TE = DocumentPools(size, (END,)).limit(
        torch.cat([before_TE, logits_TE[:length]]),
        torch.cat([before_1B, ids_BL[:1] | 1], dim=1),
        None,
    )
    assert torch.equal(both_TE[len(before_TE) :], alone_TE)


@given(texts(), st.integers(0, 10), st.integers(0, 2**20))
@settings(max_examples=60)
def test_sizes_are_drawn_for_documents_and_do_not_depend_on_the_batch(text, step, first) -> None:
    logits_TE, ids_BL, size = text
    experts, length = logits_TE.shape[1], ids_BL.shape[1]
    pools = DocumentPools(size, (END,))
    noise = dataclasses.replace(NOISE, step=step, first_token=first)
    limited_TE = pools.limit(logits_TE, ids_BL, noise)
    found = pools_in(limited_TE)
    sizes = {}
    for row, tokens in enumerate(ids_BL.tolist()):
        for place in range(length):
            if place == 0 or tokens[place - 1] == END:
                sizes[row, place] = len(found[row * length + place])
    assert all(size <= drawn <= experts for drawn in sizes.values())
    check_by_hand(found, logits_TE, ids_BL, sizes)
    alone = [
        pools.limit(logits, row[None], dataclasses.replace(noise, first_token=first + b * length))
        for b, (logits, row) in enumerate(zip(logits_TE.split(length), ids_BL, strict=True))
    ]
    assert torch.equal(torch.cat(alone), limited_TE)


def test_all_sizes_are_drawn_equally_often() -> None:
    """300 draws for each of 6 sizes: the chi-square of 5 degrees is below 20.5 with p > 0.999."""
    ids_BL = torch.ones(1800, 1, dtype=torch.long)
    limited_TE = DocumentPools(3).limit(torch.zeros(1800, 8), ids_BL, NOISE)
    counts = torch.tensor([len(pool) for pool in pools_in(limited_TE)]).bincount(minlength=9)
    assert counts[:3].sum() == 0
    assert ((counts[3:] - 300.0) ** 2 / 300).sum() < 20.5


@pytest.mark.parametrize("top_k", [1, 2])
def test_no_token_leaves_its_pool_and_no_gradient_comes_from_outside(top_k: int) -> None:
    torch.manual_seed(0)
    layer = MoELayer(12, 8, 6, top_k, pools=DocumentPools(3, (END,)), dispatch="sequential")
    x_BLH = torch.randn(2, 9, 12, requires_grad=True)
    ids_BL = torch.randint(0, 4, (2, 9))
    y_BLH, decision = layer(x_BLH, NOISE, ids_BL)
    pools = pools_in(decision.router_logits)
    for chosen, pool in zip(decision.topk_experts.tolist(), pools, strict=True):
        assert set(chosen) <= pool
    outside = torch.tensor([[e not in pool for e in range(6)] for pool in pools])
    assert (decision.router_probs[outside] == 0).all()
    (y_BLH * torch.randn_like(y_BLH)).sum().backward()
    assert layer.router.weight.grad.isfinite().all()
    assert layer.router.weight.grad.abs().sum() > 0


def test_sizes_are_drawn_in_training_only() -> None:
    torch.manual_seed(0)
    layer = MoELayer(12, 8, 6, 1, pools=DocumentPools(2, (END,)), dispatch="sequential")
    x_BLH, ids_BL = torch.randn(8, 9, 12), torch.ones(8, 9, dtype=torch.long)
    for training, expected in ((True, {2, 3, 4, 5, 6}), (False, {2})):
        _, decision = layer.train(training)(x_BLH, NOISE, ids_BL)
        sizes = {len(pool) for pool in pools_in(decision.router_logits)}
        assert sizes <= expected
        assert (len(sizes) > 1) is training


def models() -> list:
    llama = make_mixture("llama", top_k=2, noise=0.3, pool_size=2)
    return [make_model(pool_size=2), llama]


@pytest.mark.parametrize("place", [0, 1])
def test_later_tokens_do_not_move_experts_and_generation_repeats_the_forward_pass(place) -> None:
    model = models()[place].eval()
    tokens = ids(2, 10) % model.config.vocab_size
    whole = model(tokens)
    assert whole.cache is None
    for cut in (1, 4, 9):
        part = model(tokens[:, :cut])
        torch.testing.assert_close(part.logits, whole.logits[:, :cut], rtol=1e-5, atol=1e-5)
        for all_of_it, some in zip(whole.router_decisions, part.router_decisions, strict=True):
            experts = all_of_it.topk_experts.view(2, 10, -1)[:, :cut].reshape(2 * cut, -1)
            assert torch.equal(some.topk_experts, experts)
    made = model.generate(tokens[:, :5], max_new_tokens=6, do_sample=False, pad_token_id=END)
    text = tokens[:, :5]
    for _ in range(made.shape[1] - 5):
        text = torch.cat([text, model(text).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(made, text)
    with pytest.raises(ValueError, match=r"pool_size 2: .* use_cache=False"):
        model(tokens, use_cache=True)


@pytest.mark.parametrize("pad", [END, 9])
def test_padding_on_the_left_changes_nothing(pad: int) -> None:
    """GPT-2 pads with its end of text, after which a document begins; others with a token."""
    model = make_model().eval()
    config = model.config
    config.pool_size, config.pad_token_id = 2, None if pad == END else pad
    for layer in model.moe_layers().values():
        layer.router.pools = config.pools()
    tokens = ids(1, 7)
    padded = torch.cat([torch.full((1, 3), pad), tokens], dim=1)
    mask = (torch.arange(10) >= 3).long()[None]
    places = (torch.arange(10) - 3).clamp(min=0)[None]
    logits = model(padded, attention_mask=mask, position_ids=places, use_cache=False).logits[:, 3:]
    torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


def test_documents_end_where_the_text_says_or_at_the_models_own_end() -> None:
    """A base made for chats ends its turns with another token than its texts."""
    model = make_model(pool_size=2, document_end=7)
    for config, ends in (
        (model.config, (7,)),
        (make_model(pool_size=2).config, (0,)),
        (make_mixture("llama", pool_size=2).config, (0,)),
    ):
        assert config.pools() == DocumentPools(2, ends)
    assert model.moe_layers()[1].router.pools == DocumentPools(2, (7,))
    model.config.eos_token_id, model.config.document_end = [3, 2], None
    assert model.config.pools() == DocumentPools(2, (2, 3))
    model.config.pad_token_id = 5
    assert model.config.pools() == DocumentPools(2, (2, 3, 5))


def test_all_experts_in_the_pool_is_no_pool() -> None:
    tokens = ids()
    plain, pooled = make_model().eval(), make_model(pool_size=4).eval()
    assert torch.equal(plain(tokens).logits, pooled(tokens).logits)


def test_pools_are_saved_and_pruned_with_the_model(tmp_path) -> None:
    model, tokens = make_model(pool_size=3).eval(), ids()
    model.save_pretrained(tmp_path)
    again = MoEGPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.generate(tokens, max_new_tokens=2, pad_token_id=END).shape == (3, 14)
    smaller = keep_experts(model, {1: [0, 2], 3: [1, 3]})
    assert smaller.config.pool_size == 2
    assert smaller(tokens).logits.isfinite().all()


@pytest.mark.parametrize("size", [-1, 1, 5])
def test_a_size_that_is_no_choice_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"pool_size {size}: give a number from"):
        upcycle(make_dense(), [1], 4, 2, pool_size=size)
    with pytest.raises(ValueError, match=f"--pool-size {size}: give 0, or"):
        ModelConfig(num_experts=4, top_k=2, pool_size=size)


def test_what_has_no_pools_is_refused() -> None:
    with pytest.raises(ValueError, match="pool_size 2: a hash router"):
        upcycle(make_dense(), [1], 4, 2, pool_size=2, router="hash")
    with pytest.raises(ValueError, match="--pool-size 2"):
        ModelConfig(router="hash", pool_size=2)
    with pytest.raises(ValueError, match="pool_size 2: the balancing bias"):
        upcycle(make_dense(), [1], 4, 2, pool_size=2, use_expert_bias=True)
    with pytest.raises(ValueError, match="--pool-size 2: the bias of --expert-bias-rate"):
        ModelConfig(expert_bias_rate=0.01, pool_size=2)
    with pytest.raises(ValueError, match="pool_size: their routers"):
        to_transformers(models()[1])
    with pytest.raises(ValueError, match="pass input_ids"):
        make_model(pool_size=2)(inputs_embeds=torch.zeros(1, 3, 24))


def test_null_routers_have_the_pools_of_the_router() -> None:
    """Else pools alone, which make tokens of a document alike, would look like knowledge."""
    model, tokens = make_model(1, pool_size=2, router="frozen").eval(), ids(4, 20)
    reader = RouterReader(model)
    with reader.reading():
        routing = reader.read(tokens)[0]
    weights_NEH = null_weights(4, 24, 5, 1)
    counts = LayerCounts(1, 4, 1, weights_NEH, {"prose": "none"})
    counts.add(Batch(tokens.numpy(), 0, torch.arange(4).numpy(), None), routing)
    scale = model.moe_layers()[1].router.weight.square().mean().sqrt()
    for n, weight_EH in enumerate(weights_NEH):
        logits_TE = scale * routing.hidden_TH @ weight_EH.T
        limited_TE = DocumentPools(2, (END,)).limit(logits_TE, tokens, None)
        expected = limited_TE.argmax(dim=1).bincount(minlength=4)
        assert counts.null_grouped[n, 0].tolist() == expected.tolist()

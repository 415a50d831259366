"""Routing read through hooks is what the model itself decided, whatever its family."""

import re
from collections.abc import Callable
from typing import Any

import llama_models
import pytest
import torch
from conftest import REPOSITORY
from routing_models import FAMILIES, OURS, tiny_mixture
from transformers import GPT2Config, GPT2LMHeadModel

from moe_emergence.analysis.routers import RouterReader, find_routers
from moe_emergence.moe import RouterDecision

IDS = torch.randint(0, 300, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES[:4])
def test_reading_agrees_with_the_models_own_router_logits(family: str) -> None:
    model = tiny_mixture(family)
    logits = model(input_ids=IDS, output_router_logits=True).router_logits
    reader = RouterReader(model)
    with reader.reading():
        found = reader.read(IDS)
    assert reader.layers == [0, 1]
    for routing, expected in zip(found, logits, strict=True):
        probs = expected.float().softmax(dim=-1)
        torch.testing.assert_close(routing.probs_TE, probs)
        top = probs.topk(2, dim=1)
        torch.testing.assert_close(routing.probs_TE.gather(1, routing.experts_TK), top.values)
        assert torch.equal(routing.experts_TK, top.indices)
        assert routing.hidden_TH.shape == (21, 16)


@pytest.mark.parametrize("family", OURS)
def test_reading_agrees_with_our_decisions(family: str) -> None:
    model = tiny_mixture(family)
    decisions = model(input_ids=IDS).router_decisions
    reader = RouterReader(model)
    with reader.reading():
        found = reader.read(IDS)
    assert [routing.layer for routing in found] == [1, 2]
    for routing, decision in zip(found, decisions, strict=True):
        assert torch.equal(routing.probs_TE, decision.router_probs)
        assert torch.equal(routing.experts_TK, decision.topk_experts)


def test_sigmoid_routers_give_shares_and_their_own_choice() -> None:
    model = tiny_mixture("deepseek_v3")
    router = find_routers(model)[0]
    seen = []
    router.module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    reader = RouterReader(model)
    assert reader.layers == [1]  # the first layer is dense
    with reader.reading():
        (routing,) = reader.read(IDS)
    logits, _, experts = seen[0]
    scores = logits.sigmoid()
    torch.testing.assert_close(routing.probs_TE, scores / scores.sum(dim=1, keepdim=True))
    assert torch.equal(routing.experts_TK.sort(dim=1).values, experts.sort(dim=1).values)
    chosen = routing.probs_TE.gather(1, routing.experts_TK)
    assert (chosen[:, 0] >= chosen[:, 1]).all()


def test_hooks_are_gone_and_the_mode_is_back_after_reading() -> None:
    model = tiny_mixture("mixtral").train()
    reader = RouterReader(model)
    with pytest.raises(IndexError), reader.reading():
        reader.read(IDS + 300)  # beyond the vocabulary
    assert model.training
    assert not any(router.module._forward_hooks for router in reader.routers)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no routers that can be read"):
        find_routers(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10)))


def documented_names() -> dict[str, str]:
    """Module by model, out of the table of docs/transformers.md."""
    text = (REPOSITORY / "docs/transformers.md").read_text("utf-8").split("## Names for hooks")[1]
    rows = re.findall(r"^\| ([^|]+) \| `([\w.]+)` \|", text, re.M)
    return {model: name for models, name in rows for model in models.split(", ")}


@pytest.mark.parametrize(
    ("model", "make"),
    [
        ("GPT-2 of this library", lambda: tiny_mixture("learned")),
        ("Llama", lambda: llama_models.make_mixture("llama", 2)),
        ("Qwen3 of this library", lambda: llama_models.make_mixture("qwen3", 2)),
        ("Mixtral", lambda: tiny_mixture("mixtral")),
        ("OLMoE", lambda: tiny_mixture("olmoe")),
        ("Qwen3-MoE", lambda: tiny_mixture("qwen3_moe")),
        ("DeepSeek-V3", lambda: tiny_mixture("deepseek_v3")),
        ("gpt-oss", lambda: tiny_mixture("gpt_oss")),
    ],
)
def test_a_plain_hook_on_the_documented_name_sees_the_same(
    model: str, make: Callable[[], Any]
) -> None:
    """As nnsight reads a module's output, and as the document says what is in it."""
    name, mixture, token_ids = documented_names()[model], make().eval(), IDS % 60
    reader = RouterReader(mixture)
    with reader.reading():
        found = reader.read(token_ids)
    seen: dict[int, Any] = {}
    for layer in reader.layers:
        module = mixture.get_submodule(name.replace("N", str(layer)))
        module.register_forward_hook(lambda _m, _i, output, n=layer: seen.update({n: output}))
    mixture(input_ids=token_ids)
    for routing in found:
        output = seen[routing.layer]
        if isinstance(output, RouterDecision):
            logits, weights, experts = (
                output.router_logits, output.topk_weights, output.topk_experts
            )  # fmt: skip
            assert torch.equal(experts, routing.experts_TK)
            assert torch.equal(output.router_probs, routing.probs_TE)
        else:
            logits, weights, experts = output
            assert torch.equal(experts.sort(1).values, routing.experts_TK.sort(1).values)
        scores = logits.sigmoid() if model == "DeepSeek-V3" else logits.softmax(1)
        torch.testing.assert_close(scores / scores.sum(1, keepdim=True), routing.probs_TE)
        assert weights.shape == experts.shape == (token_ids.numel(), 2)

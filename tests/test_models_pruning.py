"""Mixtures cut out of mixtures compute what the whole one does without the other experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import ids, make_model
from test_models_llama import make_mixture
from transformers import AutoModelForCausalLM

from moe_emergence.analysis.ablation import without_experts
from moe_emergence.analysis.routers import find_routers
from moe_emergence.models.pruning import keep_experts

KEPT = {1: [3, 0], 3: [1, 2]}


def biased(top_k: int) -> Any:
    """A model whose balancing biases would choose an expert of no probability."""
    model = make_model(top_k, use_expert_bias=True)
    with torch.no_grad():
        for layer in model.moe_layers().values():
            layer.router.expert_bias.copy_(torch.tensor([0.3, -0.3, 0.6, 0.0]))
    return model


def models() -> list[Any]:
    return [
        make_model(1), make_model(2), biased(1), biased(2),
        make_model(1, router="frozen"), make_model(1, top1_weight="probability"),
        make_mixture("llama", 1), make_mixture("qwen3", 2),
    ]  # fmt: skip


@pytest.mark.parametrize("place", range(8))
def test_it_is_the_model_without_the_others(place: int, tmp_path: Path) -> None:
    model = models()[place].eval()
    smaller = keep_experts(model, KEPT)
    assert smaller.config.num_experts == 2
    removed = {r: set(range(4)) - set(KEPT[r.layer]) for r in find_routers(model)}
    with torch.no_grad(), without_experts(removed):
        expected = model(input_ids=ids()).logits
    with torch.no_grad():
        assert (smaller(input_ids=ids()).logits - expected).abs().max() < 1e-5
        assert (model(input_ids=ids()).logits - expected).abs().max() > 1e-3
    smaller.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=ids()).logits, smaller(input_ids=ids()).logits)


def test_all_experts_are_the_whole_model_and_it_shares_nothing() -> None:
    model = make_model(2)
    whole = keep_experts(model, {1: range(4), 3: range(4)})
    assert torch.equal(whole(input_ids=ids()).logits, model(input_ids=ids()).logits)
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize(
    ("options", "kept", "message"),
    [
        ({}, {1: [0, 1]}, r"layers \[1, 3\]"),
        ({}, {1: [0, 1], 3: [0]}, "as many of each"),
        ({}, {1: [0], 3: [0]}, "a token needs 2"),
        ({}, {1: [0, 4], 3: [0, 1]}, r"layer 1 has no experts \[4\]"),
        ({"router": "hash"}, {1: [0, 1], 3: [0, 1]}, "layer 1: a hash router"),
    ],
)
def test_what_cannot_be_kept_is_refused(options: Any, kept: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keep_experts(make_model(2, **options), kept)

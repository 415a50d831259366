"""More tokens than a model has positions: said with the number given, the limit, and what to do."""

from types import SimpleNamespace
from typing import Any

import llama_models
import pytest
import small_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SIZE, ids, make_model
from transformers import DynamicCache

from moe_emergence.analysis.sources import Source, TextChoice, read_text

LIMIT = int(SIZE["n_positions"])
MODEL: Any = make_model()


@settings(max_examples=20)
@given(st.integers(1, 2 * LIMIT), st.booleans())
def test_forward_up_to_the_limit(length: int, given_positions: bool) -> None:
    options = {"position_ids": torch.arange(length)[None]} if given_positions else {}
    tokens = ids(1, length)
    if length <= LIMIT:
        assert MODEL(tokens, **options).logits.shape[1] == length
        return
    given_as = f"position_ids up to {length - 1}" if given_positions else f"{length} tokens"
    with pytest.raises(ValueError, match=rf"^{given_as}: the model has {LIMIT} positions"):
        MODEL(tokens, **options)


@settings(max_examples=10)
@given(st.integers(1, LIMIT), st.integers(1, LIMIT))
def test_cached_decoding_up_to_the_limit(first: int, then: int) -> None:
    cache = DynamicCache(config=MODEL.config)
    MODEL(ids(1, first), cache=cache, use_cache=True)
    if first + then <= LIMIT:
        MODEL(ids(1, then), cache=cache, use_cache=True)
        return
    with pytest.raises(ValueError, match=rf"^{first + then} tokens: the model has {LIMIT}"):
        MODEL(ids(1, then), cache=cache, use_cache=True)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("padding", [0, 5])
def test_generation_up_to_the_limit(use_cache: bool, padding: int) -> None:
    """Padding takes no position."""
    tokens = torch.cat([torch.zeros(2, padding, dtype=torch.long), ids(2, 40)], dim=1)
    mask = (torch.arange(tokens.shape[1]) >= padding).long().expand(2, -1)
    options: Any = {"attention_mask": mask, "do_sample": False, "use_cache": use_cache}
    options |= {"pad_token_id": 0, "eos_token_id": -1}
    # the last token that is added is not read
    fits = LIMIT - 40 + 1
    found = MODEL.generate(tokens, max_new_tokens=fits, **options)
    assert found.shape[1] == tokens.shape[1] + fits
    with pytest.raises(ValueError, match=rf"^{LIMIT + 1} tokens: .*max_new_tokens"):
        MODEL.generate(tokens, max_new_tokens=fits + 1, **options)


def test_the_training_step_asks_the_device_nothing() -> None:
    """On the meta device there are shapes and no values."""
    model: Any = small_models.make_model(dispatch="grouped").to("meta")
    with pytest.raises(ValueError, match=f"^{LIMIT + 1} tokens"):
        model(torch.zeros(2, LIMIT + 1, dtype=torch.long, device="meta"))


def test_rotary_positions_have_no_end() -> None:
    model = llama_models.make_mixture("llama")
    assert model(ids(1, 2 * LIMIT)).logits.isfinite().all()


@pytest.mark.parametrize("name", ["n_positions", "max_position_embeddings"])
def test_analyze_names_the_flag_before_it_reads_anything(name: str) -> None:
    sees = SimpleNamespace(config=SimpleNamespace(**{name: 32}))
    source = Source("mine", "nowhere", "model", sees, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^--block-size 33: mine sees 32 tokens"):
        read_text(source, TextChoice(data="no-such-folder", block_size=33))
    with pytest.raises(ValueError, match=r"^--tokenizer nowhere"):
        read_text(source, TextChoice(data="no-such-folder", block_size=32))

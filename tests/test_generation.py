"""Generation from the cache, against a loop that reads the whole text anew for every token.

The loop knows no cache and no argument of transformers' but the tokens and where they stand, so
that no renamed argument can make both sides wrong alike.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from small_models import VOCAB, ids, make_dense, make_model
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel

from moe_emergence.models import upcycle

SETTINGS = {"pad_token_id": 0, "eos_token_id": None}
NEW = 10


def make(kind: str) -> PreTrainedModel:
    """In fp64, where the order of sums decides no token, and with blocks that outweigh the
    embedding, which alone would repeat the last token for ever."""
    models = {
        "gpt2": make_dense,
        "no-mixture": lambda: upcycle(make_dense(), [], 4, 1),
        "top1": lambda: make_model(1),
        "top2": lambda: make_model(2),
        "hash": lambda: make_model(1, router="hash"),
    }
    model = models[kind]().double().eval()
    with torch.no_grad():
        for block in model.transformer.h:
            for parameter in block.parameters():
                parameter.mul_(3)
    return model


KINDS = ("gpt2", "no-mixture", "top1", "top2", "hash")
MIXTURES = KINDS[2:]


@contextmanager
def lengths_read(model: PreTrainedModel) -> Iterator[list[int]]:
    """How many tokens the model embeds, call by call."""
    lengths: list[int] = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(
        lambda _, inputs: lengths.append(inputs[0].shape[1])
    )
    try:
        yield lengths
    finally:
        handle.remove()


def mask_of(lengths: list[int]) -> Tensor:
    """(B, L) of left-padded prompts."""
    longest = max(lengths)
    return torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])


@torch.no_grad()
def reread(model: PreTrainedModel, tokens: Tensor, steps: int, sample: bool = False) -> Tensor:
    """Each next token from a forward pass over the whole text (1, L)."""
    for _ in range(steps):
        scores = model(tokens).logits[:, -1].float()
        chosen = torch.multinomial(scores.softmax(-1), 1) if sample else scores.argmax(-1)[:, None]
        tokens = torch.cat([tokens, chosen], dim=1)
    return tokens


@pytest.mark.parametrize("length", [1, 2, 7, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_is_rereading(kind: str, length: int) -> None:
    model = make(kind)
    prompt = ids(1, length)
    expected = reread(model, prompt, NEW)
    for use_cache, lengths in ((True, [length] + [1] * (NEW - 1)),
                               (False, [*range(length, length + NEW)])):  # fmt: skip
        with lengths_read(model) as seen:
            found = model.generate(
                prompt, max_new_tokens=NEW, do_sample=False, use_cache=use_cache, **SETTINGS
            )
        assert torch.equal(found, expected)
        assert seen == lengths
    assert len(set(expected[0, length:].tolist())) > 2, "a constant continuation shows nothing"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_sampled_generation_is_rereading(kind: str, seed: int) -> None:
    model = make(kind)
    prompt = ids(1, 6, seed=seed)
    torch.manual_seed(seed)
    expected = reread(model, prompt, NEW, sample=True)
    for use_cache in (True, False):
        torch.manual_seed(seed)
        found = model.generate(
            prompt, max_new_tokens=NEW, do_sample=True, top_k=0, use_cache=use_cache, **SETTINGS
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_left_padded_batch_is_each_prompt_by_itself(kind: str, use_cache: bool) -> None:
    model = make(kind)
    lengths = [9, 4, 1]
    mask = mask_of(lengths)
    batch = ids(3, 9) * mask
    found = model.generate(
        batch,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=use_cache,
        **SETTINGS,
    )
    for row, length in enumerate(lengths):
        expected = reread(model, batch[row : row + 1, -length:], NEW)
        assert torch.equal(found[row : row + 1, -length - NEW :], expected)


@torch.no_grad()
def beams(model: PreTrainedModel, prompt: Tensor, steps: int, width: int) -> Tensor:
    """The most probable of the `width` texts that beam search keeps of (1, L), without a cache."""
    texts, totals = prompt, torch.zeros(1, 1)
    for _ in range(steps):
        step = model(texts).logits[:, -1].float().log_softmax(-1)
        totals, places = (totals + step).flatten().topk(width)
        texts = torch.cat([texts[places // VOCAB], (places % VOCAB)[:, None]], dim=1)
        totals = totals[:, None]
    return texts[:1]


@pytest.mark.parametrize("width", [2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_beam_search_is_rereading(kind: str, width: int) -> None:
    model = make(kind)
    prompt = ids(1, 6)
    expected = beams(model, prompt, NEW, width)
    for use_cache in (True, False):
        found = model.generate(
            prompt,
            max_new_tokens=NEW,
            num_beams=width,
            do_sample=False,
            use_cache=use_cache,
            **SETTINGS,
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_goes_on_from_a_returned_cache(kind: str) -> None:
    model = make(kind)
    prompt, more = ids(1, 6), ids(1, 3, seed=8)
    settings = {"max_new_tokens": NEW, "do_sample": False, **SETTINGS}
    first = model.generate(prompt, return_dict_in_generate=True, **settings)
    assert torch.equal(first.sequences, reread(model, prompt, NEW))
    asked = torch.cat([first.sequences, more], dim=1)
    expected = reread(model, asked, NEW)
    with lengths_read(model) as seen:
        found = model.generate(asked, cache=first.cache, **settings)
    assert torch.equal(found, expected)
    # the last token generated has been read by nobody yet
    assert seen == [1 + more.shape[1]] + [1] * (NEW - 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [1, 5, 9])
def test_a_text_in_two_calls_is_the_text_in_one(kind: str, split: int) -> None:
    model = make(kind)
    tokens = ids(2, 10)
    whole = model(tokens).logits
    start = model(tokens[:, :split], use_cache=True)
    rest = model(tokens[:, split:], cache=start.cache)
    torch.testing.assert_close(rest.logits, whole[:, split:], rtol=1e-10, atol=1e-12)


def test_without_mixtures_generation_is_that_of_transformers() -> None:
    theirs, ours = make("gpt2"), make("no-mixture")
    assert type(theirs) is GPT2LMHeadModel
    mask = mask_of([9, 5])
    batch = ids(2, 9) * mask
    for choice in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 3}):
        found = []
        for model in (theirs, ours):
            torch.manual_seed(4)
            found.append(
                model.generate(
                    batch,
                    attention_mask=mask,
                    max_new_tokens=NEW,
                    output_scores=True,
                    return_dict_in_generate=True,
                    **choice,
                    **SETTINGS,
                )
            )
        assert torch.equal(found[0].sequences, found[1].sequences)
        for a, b in zip(found[0].scores, found[1].scores, strict=True):
            torch.testing.assert_close(a, b, rtol=2**-22, atol=1e-10)


@pytest.mark.parametrize("kind", MIXTURES)
def test_an_unknown_argument_is_an_error(kind: str) -> None:
    """Above all one that was known once: it would change the result in silence."""
    model = make(kind)
    block = model.transformer.h[1]
    hidden = torch.zeros(1, 4, 24, dtype=torch.float64)
    for name in ("atention_mask", "past_key_values", "cache_position", "is_causal", "head_mask"):
        wrong = {name: None}
        for call, given in (
            (model, ids(1, 4)),
            (model.transformer, ids(1, 4)),
            (block, hidden),
            (block.mlp, hidden),
        ):
            with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}'"):
                call(given, **wrong)
    with pytest.raises((TypeError, ValueError), match="atention_mask"):
        model.generate(ids(1, 4), atention_mask=torch.ones(1, 4), max_new_tokens=1, **SETTINGS)

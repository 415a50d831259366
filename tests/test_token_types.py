"""Types of tokens in code, math and prose, of whole and of cut texts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from suite_folders import TEXTS
from transformers import PreTrainedTokenizerFast

from moe_emergence.analysis.token_types import TOKEN_TYPES, character_types, token_types
from moe_emergence.data.tokenizer import train_bpe


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(TEXTS, 400)


CLASSES = ("python", "math", "words")


def kinds(text: str, token_class: str) -> dict[str, str]:
    """The type of each word of a text, by its first character."""
    types = character_types(text, token_class)
    return {word: types[text.index(word)] for word in text.split()}


def test_code_has_the_types_of_tokenize() -> None:
    text = "if total >= 10 :\n    name = 'a b' # why not\n"
    found = kinds(text, "python")
    assert found == {
        "if": "keyword", "total": "name", ">=": "operator", "10": "number", ":": "operator",
        "name": "name", "=": "operator", "'a": "string", "b'": "string", "#": "comment",
        "why": "comment", "not": "comment",
    }  # fmt: skip
    assert character_types(text, "python")[text.index("a b") + 1] == "string"


@pytest.mark.parametrize(
    ("text", "word", "kind"),
    [
        ("        x = 1\n    y = 2 # two\n", "two", "comment"),  # dedents to nowhere
        ("x = 1 # one\ny = '''not closed\nreturn 3\n", "one", "comment"),
        ("x = 1\ny = '''not closed\nreturn 3\n", "return", "keyword"),
        ("f(a, # one\n  b\n", "one", "comment"),  # bracket not closed
        (") ] }\nwhile True: pass", "while", "keyword"),
        ("x = 'half\nreturn 12", "12", "number"),
        ("x = ? $ 5 # five", "five", "comment"),
        ("def f():\n\treturn f'{x!r} and'\n", "and", "string"),
    ],
)
def test_code_that_does_not_parse_is_typed_all_the_same(text: str, word: str, kind: str) -> None:
    assert character_types(text, "python")[text.index(word)] == kind


def test_math_and_prose() -> None:
    assert kinds("Tom has 3.5 + 12 apples , no ?", "math") == {
        "Tom": "word", "has": "word", "3.5": "number", "+": "operator", "12": "number",
        "apples": "word", ",": "punctuation", "no": "word", "?": "punctuation",
    }  # fmt: skip
    assert kinds("The people of Ohio don't fear 1941 .", "words") == {
        "The": "function word", "people": "content word", "of": "function word",
        "Ohio": "capitalised", "don't": "content word", "fear": "content word", "1941": "number",
        ".": "punctuation",
    }  # fmt: skip


@given(st.sampled_from(CLASSES), st.text(max_size=60))
@settings(max_examples=200)
def test_every_character_of_any_text_has_a_type(token_class: str, text: str) -> None:
    types = character_types(text, token_class)
    assert len(types) == len(text)
    assert set(types) <= set(TOKEN_TYPES[token_class])


@given(st.text(max_size=40), st.integers(0, 5), st.sampled_from(CLASSES))
@settings(max_examples=100)
def test_any_block_is_typed_even_one_cut_inside_a_character(
    tokenizer: PreTrainedTokenizerFast, text: str, cut: int, token_class: str
) -> None:
    ids = tokenizer(text + "é→x", split_special_tokens=True)["input_ids"][cut:]
    ids = np.array([[*ids, tokenizer.eos_token_id, *ids]], dtype=np.int32)
    types = token_types(ids, token_class, tokenizer)
    names = TOKEN_TYPES[token_class]
    middle = (ids.shape[1] - 1) // 2
    assert names[types[0, middle]] == "end of text"
    # an end of text begins a new text: both halves are typed alike
    assert (types[0, :middle] == types[0, middle + 1 :]).all()
    assert (types < len(names)).all()


def test_tokens_get_the_type_of_their_visible_characters(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = "def mean(values):\n    # the mean\n    return values"
    ids = np.array([tokenizer(text)["input_ids"]], dtype=np.int32)
    names = TOKEN_TYPES["python"]
    types = [names[t] for t in token_types(ids, "python", tokenizer)[0]]
    found = [
        (tokenizer.decode([token]).strip(), kind)
        for token, kind in zip(ids[0].tolist(), types, strict=True)
    ]
    assert ("def", "keyword") in found
    assert ("return", "keyword") in found
    assert all(kind == "space" for word, kind in found if not word)
    # the same word in a comment and out of it
    assert {kind for word, kind in found if word == "mean"} == {"name", "comment"}


def test_a_tokenizer_of_another_kind_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    other = train_bpe(TEXTS, 300)
    other.add_tokens(["▁word"])
    ids = np.array([[len(other) - 1]], dtype=np.int32)
    with pytest.raises(ValueError, match="byte-level"):
        token_types(ids, "python", other)

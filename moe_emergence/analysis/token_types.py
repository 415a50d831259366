"""What kind of token every token of a block is, without a language model.

Python is read by its own `tokenize`, mathematics and words by a pattern over the text; a token gets
the type of most of its visible characters. Text cut out of the middle of a file is typed as well as
its lines allow: a string that began before the block is not known to be one.

Letters: R blocks, L tokens per block.
"""

import functools
import io
import keyword
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moe_emergence.config import TokenClass

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "end of text"
TOKEN_TYPES: dict[TokenClass, tuple[str, ...]] = {
    "python": (
        "keyword", "name", "number", "string", "comment", "operator", "space", "other", END_OF_TEXT
    ),
    "math": ("number", "operator", "word", "punctuation", "space", END_OF_TEXT),
    "words": (
        "function word", "content word", "capitalised", "number", "punctuation", "space",
        END_OF_TEXT,
    ),
    "none": (),
}  # fmt: skip
"""Names of the types of each class of text; a type's number is its place."""

NUM_TYPES = max(map(len, TOKEN_TYPES.values()))

FUNCTION_WORDS = frozenset(
    """a an the this that these those some any each every no all both either neither such
    i me my mine myself you your yours yourself he him his himself she her hers herself it its
    itself we us our ours ourselves they them their theirs themselves who whom whose which what
    and or but nor so yet if then than because while although though unless until since as whether
    of in on at by for with without about against between among into through during before after
    above below to from up down out off over under again upon within toward towards
    be am is are was were been being have has had having do does did doing will would shall should
    can could may might must not never there here when where why how also only just very too more
    most other own same""".split()  # noqa: SIM905
)
"""English words that carry grammar rather than content; closed, lower case."""

_PATTERNS: dict[TokenClass, re.Pattern[str]] = {
    "python": re.compile(
        r"(?P<number>\d[\w.]*)|(?P<name>\w+)|(?P<space>\s+)|(?P<string>[\"'])"
        r"|(?P<operator>[-+*/%@&|^~<>=!.,:;()\[\]{}])|(?P<other>.)"
    ),
    "math": re.compile(
        r"(?P<number>\d+(?:[.,]\d+)*)|(?P<word>[^\W\d_]+(?:['’][^\W\d_]+)*)|(?P<space>\s+)"
        r"|(?P<operator>[-+*/=<>^%×÷±≤≥≈√])|(?P<punctuation>.)"
    ),
    "words": re.compile(
        r"(?P<number>\d+(?:[.,]\d+)*)|(?P<word>[^\W\d_]+(?:['’][^\W\d_]+)*)|(?P<space>\s+)"
        r"|(?P<punctuation>.)"
    ),
}
_PYTHON = {
    tokenize.NUMBER: "number",
    tokenize.STRING: "string",
    tokenize.COMMENT: "comment",
    tokenize.OP: "operator",
}


def token_types(
    token_ids_RL: npt.NDArray[np.int32],
    token_class: TokenClass,
    tokenizer: "PreTrainedTokenizerBase",
) -> npt.NDArray[np.int8]:
    """Type of every token (R, L), a place in `TOKEN_TYPES` of its class.

    Args:
        token_ids_RL: blocks of a byte-level tokenizer.
        token_class: of the text; not "none".
        tokenizer: a fast byte-level BPE, as GPT-2's or one trained here.

    Raises:
        ValueError: for a tokenizer that is not byte-level.
    """
    types = np.empty(token_ids_RL.shape, dtype=np.int8)
    lengths = token_byte_lengths(tokenizer)
    for block, ids in enumerate(token_ids_RL):
        types[block] = _block_types(ids, token_class, tokenizer, lengths)
    return types


def token_byte_lengths(tokenizer: "PreTrainedTokenizerBase") -> npt.NDArray[np.int64]:
    """Bytes of every vocabulary entry: byte-level BPE writes one character for each byte."""
    vocabulary = tokenizer.get_vocab()
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, index in vocabulary.items():
        lengths[index] = len(token)
    return lengths


def _block_types(
    ids: npt.NDArray[np.int32],
    token_class: TokenClass,
    tokenizer: "PreTrainedTokenizerBase",
    lengths: npt.NDArray[np.int64],
) -> npt.NDArray[np.int8]:
    names = TOKEN_TYPES[token_class]
    types = np.full(len(ids), names.index(END_OF_TEXT), dtype=np.int8)
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    # a document at a time: what follows an end of text is another text
    for start, stop in zip([0, *(ends + 1)], [*ends, len(ids)], strict=True):
        if start < stop:
            text, spans = text_and_spans(ids[start:stop], tokenizer, lengths)
            chars = character_types(text, token_class)
            types[start:stop] = [names.index(_majority(chars[a:b], text[a:b])) for a, b in spans]
    return types


def text_and_spans(
    ids: npt.NDArray[np.int32],
    tokenizer: "PreTrainedTokenizerBase",
    lengths: npt.NDArray[np.int64],
) -> tuple[str, list[tuple[int, int]]]:
    """The text of the tokens and the characters (first, last + 1) that each token has a byte of."""
    data = _token_bytes(tokenizer, ids.tolist())
    text = data.decode("utf-8", errors="surrogateescape")
    sizes = [len(char.encode("utf-8", "surrogateescape")) for char in text]
    char_of_byte = np.repeat(np.arange(len(text)), sizes)
    last = np.cumsum(lengths[ids])
    first = last - lengths[ids]
    spans = [
        (int(char_of_byte[a]), int(char_of_byte[b - 1]) + 1)
        for a, b in zip(first, last, strict=True)
    ]
    return re.sub("[\ud800-\udfff]", "\ufffd", text), spans


def _token_bytes(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> bytes:
    alphabet = _byte_alphabet()
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    try:
        return bytes(alphabet[char] for token in tokens for char in token)
    except KeyError as error:
        raise ValueError(
            f"the tokenizer is not a byte-level one: a token holds {error}; token types need "
            "GPT-2's tokenizer or one trained here"
        ) from error


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The byte behind each character of GPT-2's byte-level alphabet.

    Printable Latin-1 characters stand for themselves; the other bytes take the characters from 256
    on, in order (Radford et al. 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


def _majority(types: Sequence[str], text: str) -> str:
    """The most frequent type of the visible characters; "space" where there are none."""
    visible = [kind for kind, char in zip(types, text, strict=True) if not char.isspace()]
    return max(visible, key=visible.count) if visible else "space"


def character_types(text: str, token_class: TokenClass) -> list[str]:
    """The type of every character of a text; white space in a string is a string."""
    types = _python_types(text) if token_class == "python" else [""] * len(text)
    for match in _PATTERNS[token_class].finditer(text):
        kind = match.lastgroup or ""
        if kind == "word" and token_class == "words":
            kind = _word_class(match.group())
        elif kind == "name" and keyword.iskeyword(match.group()):
            kind = "keyword"
        for place in range(*match.span()):
            types[place] = types[place] or kind
    return types


def _word_class(word: str) -> str:
    """Function words first: a capital at the start of a sentence does not make "The" a name."""
    if word.lower().replace("’", "'").split("'")[0] in FUNCTION_WORDS:
        return "function word"
    return "capitalised" if word[0].isupper() else "content word"


def _python_types(text: str) -> list[str]:
    """Types of the characters that `tokenize` reads; "" for the others.

    Where it gives up, reading starts again at the line it gave up on (an indentation that fits
    nothing before it) or after it (a string that never ends).
    """
    lines = io.StringIO(text, newline="\n").readlines()
    starts = np.cumsum([0, *map(len, lines)]).tolist()
    types = [""] * len(text)
    row = 0
    while row < len(lines):
        rest = io.StringIO("".join(lines[row:]), newline="\n")
        try:
            for kind, (row_a, col_a), (row_b, col_b) in _python_tokens(rest.readline):
                first, last = starts[row + row_a - 1] + col_a, starts[row + row_b - 1] + col_b
                types[first:last] = [kind] * (last - first)
            return types
        except IndentationError as error:
            row += max(1, (error.lineno or 1) - 1)
        except (tokenize.TokenError, SyntaxError) as error:
            failed_row = error.args[1][0] if len(error.args) > 1 else 1
            row += max(1, failed_row)
    return types


def _python_tokens(
    readline: Callable[[], str],
) -> Iterator[tuple[str, tuple[int, int], tuple[int, int]]]:
    """Type, start and end (row from 1, column) of the tokens that have a type."""
    depth = 0
    for token in tokenize.generate_tokens(readline):
        name = tokenize.tok_name[token.type]
        # from Python 3.12 on the parts of an f-string are tokens; before, it is one string
        depth += name == "FSTRING_START"
        if depth or name.startswith("FSTRING"):
            yield "string", token.start, token.end
        elif token.type == tokenize.NAME:
            kind = "keyword" if keyword.iskeyword(token.string) else "name"
            yield kind, token.start, token.end
        elif token.type in _PYTHON:
            yield _PYTHON[token.type], token.start, token.end
        depth -= name == "FSTRING_END"

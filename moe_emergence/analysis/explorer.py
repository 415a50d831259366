"""Real text with the expert of every token, for the report's token explorer."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moe_emergence.analysis.routers import RouterReader
from moe_emergence.analysis.token_types import text_and_spans, token_byte_lengths
from moe_emergence.settings import check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = 3
OWN_TEXTS = 8
TOKENS = 256

logger = logging.getLogger(__name__)


def explore(
    reader: RouterReader,
    blocks: Mapping[str, Tensor],
    tokenizer: "PreTrainedTokenizerBase",
    own: Mapping[str, Sequence[Tensor]] | None = None,
) -> dict[str, Any]:
    """JSON-ready: num_experts, top_k, layers, and some texts of every domain, after those of `own`.

    A text has `domain`, `title`, `tokens` (the pieces, which joined give the text back), `experts`
    [layer][token][slot] and `probabilities` likewise, rounded to three digits.
    """
    texts: list[dict[str, Any]] = []
    num_experts = top_k = 0
    pieces = pieces_of(tokenizer)
    read = {**(own or {}), **{domain: _spread(part) for domain, part in blocks.items()}}
    with reader.reading():
        for domain, parts in read.items():
            for place, ids_L in enumerate(parts, start=1):
                routings = reader.read(ids_L[None])
                num_experts = routings[0].probs_TE.shape[1]
                top_k = routings[0].experts_TK.shape[1]
                texts.append(
                    {
                        "domain": domain,
                        "title": f"{domain} {place}",
                        "tokens": pieces(ids_L.tolist()),
                        "experts": [r.experts_TK.tolist() for r in routings],
                        "probabilities": [
                            [
                                [round(p, 3) for p in row]
                                for row in r.probs_TE.gather(1, r.experts_TK).tolist()
                            ]
                            for r in routings
                        ],
                    }
                )
    return {
        "num_experts": num_experts,
        "top_k": top_k,
        "layers": reader.layers,
        "texts": texts,
    }


def own_text(
    path: Path, tokenizer: "PreTrainedTokenizerBase", length: int
) -> dict[str, list[Tensor]]:
    """The beginning of a text file for the explorer, in at most `OWN_TEXTS` blocks of `length`.

    A block is read without what stands before it, as those of the domains are.

    Raises:
        ValueError: naming --text, where the file cannot be read or has no token.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"--text {path}: it cannot be read as UTF-8 ({error})") from error
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int32)
    check(ids.numel() > 0, "--text", path, "it has no text; give a file that does")
    parts = ids.split(min(length, TOKENS))
    if len(parts) > OWN_TEXTS:
        logger.warning("--text %s: only its first %d tokens", path, OWN_TEXTS * len(parts[0]))
    return {path.name: list(parts[:OWN_TEXTS])}


def pieces_of(tokenizer: "PreTrainedTokenizerBase") -> Callable[[Sequence[int]], list[str]]:
    """What gives the piece of text of every token; a character over several is the last one's."""
    try:
        lengths = token_byte_lengths(tokenizer)
        text_and_spans(np.zeros(1, np.int32), tokenizer, lengths)
    except ValueError:  # not byte-level: pieces then need not join to the very same text
        return lambda ids: [str(tokenizer.decode([token])) for token in ids]

    def pieces(ids: Sequence[int]) -> list[str]:
        text, spans = text_and_spans(np.asarray(ids, np.int32), tokenizer, lengths)
        found = []
        done = 0
        for (_, end), following in zip(spans, [*spans[1:], (len(text), len(text))], strict=True):
            complete = min(end, following[0])
            found.append(text[done : max(done, complete)])
            done = max(done, complete)
        return found

    return pieces


def _spread(blocks: Tensor) -> list[Tensor]:
    """A few blocks far from each other, cut to `TOKENS`."""
    step = max(1, len(blocks) // TEXTS)
    return [block[:TOKENS] for block in blocks[::step][:TEXTS]]

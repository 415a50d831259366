"""Real text with the expert of every token, for the report's token explorer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moe_emergence.analysis.routers import RouterReader
from moe_emergence.analysis.token_types import text_and_spans, token_byte_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = 3
TOKENS = 256


def explore(
    reader: RouterReader, blocks: Mapping[str, Tensor], tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Any]:
    """JSON-ready: num_experts, top_k, layers, and texts of every domain.

    A text has `domain`, `title`, `tokens` (the pieces, which joined give the text back), `experts`
    [layer][token][slot] and `probabilities` likewise, rounded to three digits.
    """
    texts: list[dict[str, Any]] = []
    num_experts = top_k = 0
    with reader.reading():
        for domain, part in blocks.items():
            for place, ids_L in enumerate(_spread(part)):
                routings = reader.read(ids_L[None])
                num_experts = routings[0].probs_TE.shape[1]
                top_k = routings[0].experts_TK.shape[1]
                texts.append(
                    {
                        "domain": domain,
                        "title": f"{domain} {place + 1}",
                        "tokens": token_texts(ids_L, tokenizer),
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


def token_texts(ids_L: Tensor, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The piece of text of every token; a character over several tokens is the last one's."""
    try:
        lengths = token_byte_lengths(tokenizer)
        text, spans = text_and_spans(ids_L.cpu().int().numpy(), tokenizer, lengths)
    except ValueError:  # not byte-level: pieces then need not join to the very same text
        return [str(tokenizer.decode([token])) for token in ids_L.tolist()]
    pieces = []
    done = 0
    for (_, end), following in zip(spans, [*spans[1:], (len(text), len(text))], strict=True):
        complete = min(end, following[0])
        pieces.append(text[done : max(done, complete)])
        done = max(done, complete)
    return pieces


def _spread(blocks: Tensor) -> list[Tensor]:
    """A few blocks far from each other, cut to `TOKENS`."""
    step = max(1, len(blocks) // TEXTS)
    return [block[:TOKENS] for block in blocks[::step][:TEXTS]]

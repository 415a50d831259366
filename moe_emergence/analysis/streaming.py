"""A model's routing over blocks of text, counted batch by batch: memory does not grow with them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from moe_emergence.analysis.ablation import next_token_losses
from moe_emergence.analysis.counts import GROUPS, NULL_ROUTERS, Batch, RoutingCounts
from moe_emergence.analysis.routers import RouterReader
from moe_emergence.analysis.token_types import token_types
from moe_emergence.config import TokenClass
from moe_emergence.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def count_routing(
    reader: RouterReader,
    blocks: Mapping[str, Tensor],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    classes: Mapping[str, TokenClass] | None = None,
    *,
    batch_size: int = 8,
    seed: int = 0,
    null_routers: int = NULL_ROUTERS,
) -> RoutingCounts:
    """Route all blocks through the model and count, for every layer.

    Args:
        reader: of the model.
        blocks: token ids (R, L) of each domain.
        tokenizer: byte-level; without one no token types are counted.
        classes: how the tokens of each domain are told apart; not at all where it says nothing.
        batch_size: blocks in one forward pass.
        seed: of the null routers.
        null_routers: random routers of every layer to count too.
    """
    known = classes if classes is not None and tokenizer is not None else {}
    of_each: dict[str, TokenClass] = {domain: known.get(domain, "none") for domain in blocks}
    counts = RoutingCounts(of_each, null_routers=null_routers)
    total = sum(len(part) for part in blocks.values())
    with reader.reading(), progress_bar("routing of the text", total) as advance:
        for domain, (name, part) in enumerate(blocks.items()):
            groups = np.arange(len(part)) * min(GROUPS, len(part)) // max(1, len(part))
            for start in range(0, len(part), batch_size):
                ids = part[start : start + batch_size]
                batch = make_batch(
                    ids, domain, groups[start : start + batch_size], tokenizer, of_each[name]
                )
                routings, logits = reader.read_and_predict(ids)
                counts.add(batch, routings, seed)
                losses = next_token_losses(logits, ids.long().to(logits.device))
                counts.losses.setdefault(name, []).extend(losses.tolist())
                advance(len(ids))
    return counts


def make_batch(
    ids_BL: Tensor,
    domain: int,
    groups: "np.ndarray[tuple[int], np.dtype[np.int64]]",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    token_class: TokenClass = "none",
) -> Batch:
    """The blocks with the types of their tokens."""
    ids = ids_BL.cpu().numpy().astype(np.int32)
    types = None
    if tokenizer is not None and token_class != "none":
        types = token_types(ids, token_class, tokenizer)
    return Batch(ids.astype(np.int64), domain, groups, types)


def is_byte_level(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether token types can be told: the vocabulary is written in GPT-2's byte alphabet."""
    try:
        token_types(np.zeros((1, 1), np.int32) + 10, "python", tokenizer)
    except (ValueError, IndexError, TypeError):
        return False
    return True

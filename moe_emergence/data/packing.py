"""Documents of tokens become blocks of one length.

Letters: N blocks, L tokens per block (`block_size`).
"""

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

Blocks = npt.NDArray[np.int32]
IMBALANCE_TO_WARN = 1.5


@dataclass(frozen=True)
class PackedBlocks:
    """Blocks (N, L) int32, the number of tokens with ends of text, and of those dropped."""

    blocks: Blocks
    tokens: int
    dropped: int


def pack(token_lists: Iterable[Sequence[int]], eos_id: int, block_size: int) -> PackedBlocks:
    """Put `eos_id` after every document, join them in order and cut blocks of `block_size`.

    Every token is in one block, in order, but for the last `dropped` < `block_size` tokens.
    """
    stream = itertools.chain.from_iterable((*tokens, eos_id) for tokens in token_lists)
    flat = np.fromiter(stream, dtype=np.int32)
    count, dropped = divmod(flat.size, block_size)
    blocks = flat[: count * block_size].reshape(count, block_size)
    return PackedBlocks(blocks, flat.size, dropped)


def check_blocks(domain: str, split: str, packed: PackedBlocks) -> None:
    """Raise `ValueError` if a split of a domain does not fill one block."""
    if not len(packed.blocks):
        block_size = packed.blocks.shape[1]
        raise ValueError(
            f"{domain}: the {split} split has {packed.tokens} tokens, not one block of "
            f"{block_size}; raise --size-mb or lower --block-size"
        )


def balance(blocks: Mapping[str, Blocks], seed: int) -> dict[str, Blocks]:
    """Shuffle every domain's blocks, then truncate all domains to the smallest.

    The shuffle depends on `seed` and the place of the domain in the mapping.
    """
    smallest = min(len(rows) for rows in blocks.values())
    return {
        domain: rows[np.random.default_rng([seed, index]).permutation(len(rows))[:smallest]]
        for index, (domain, rows) in enumerate(blocks.items())
    }


def warn_if_unbalanced(blocks: Mapping[str, Blocks]) -> None:
    """Log a warning if the largest domain has more than 1.5 times the blocks of the smallest."""
    counts = {domain: len(rows) for domain, rows in blocks.items()}
    ratio = max(counts.values()) / min(counts.values())
    if ratio > IMBALANCE_TO_WARN:
        logger.warning(
            "unbalanced domains: the largest has %.1f times the train blocks of the smallest "
            "(%s); --balance-tokens makes them equal",
            ratio,
            ", ".join(f"{domain} {count}" for domain, count in counts.items()),
        )

"""Which blocks of a text belong together: those of one document.

Letters: R blocks, L tokens of a block.
"""

import numpy as np
import numpy.typing as npt
from torch import Tensor

Ints = npt.NDArray[np.int64]
FEWEST = 5
"""Documents that are enough to be resampled."""


def main_documents(blocks: Tensor, eos_id: int) -> Ints:
    """(R,) the document, counted from 0, that most tokens of each block are of.

    Args:
        blocks: token ids (R, L), one after the other as the text was cut.
        eos_id: ends every document.
    """
    ends = (blocks == eos_id).flatten().long()
    document: Ints = (ends.cumsum(0) - ends).view(blocks.shape).mode(dim=1).values.cpu().numpy()
    return document


def spread(count: int, most: int) -> Ints:
    """Places of at most `most` of `count` blocks, evenly apart, so of as many documents as can be.

    All of them where there are no more.
    """
    if count <= most:
        return np.arange(count)
    return (np.arange(most) * count) // most


def resampling_units(documents: Ints) -> Ints:
    """(R,) what each block is drawn with: its document, or itself where documents are too few.

    Numbered from 0 without gaps. Blocks of one document are alike, so an interval over blocks is
    too narrow; one over fewer than five documents would say as little of the others.
    """
    different, units = np.unique(documents, return_inverse=True)
    return units if len(different) >= FEWEST else np.arange(len(documents))


def blocks_each(blocks: dict[str, Tensor], tokens: int) -> int:
    """Blocks of every domain that make at most `tokens` tokens together; at least one, and
    all of them where `tokens` is 0."""
    if not tokens:
        return max(len(part) for part in blocks.values())
    length = max(part.shape[1] for part in blocks.values())
    return max(1, tokens // (length * len(blocks)))


def take(blocks: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """Of each domain the blocks that `blocks_each` allows, evenly apart."""
    each = blocks_each(blocks, tokens)
    return {domain: part[spread(len(part), each)] for domain, part in blocks.items()}

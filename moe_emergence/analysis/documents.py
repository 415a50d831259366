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

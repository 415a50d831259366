"""Training documents that are almost one of the evaluation: edited copies, filled-in templates."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moe_emergence.data.split import Split, identity
from moe_emergence.progress import progress_bar

if TYPE_CHECKING:
    from datasketch import MinHash

SIMILARITY = 0.8
"""Least Jaccard index of two documents' shingles that makes them near-duplicates."""
SHINGLE_WORDS = 5
BANDS, ROWS_PER_BAND = 25, 5
"""Of the MinHash index: a pair at `SIMILARITY` is missed once in 20,000 times."""

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]|\w+|[^\w\s]")
"""A word or a sign; in scripts written without spaces a character."""

_log = logging.getLogger(__name__)


def shingles(text: str) -> frozenset[str]:
    """Every five neighbouring words of a text, all if there are fewer, without case."""
    words = _WORD.findall(identity(text).casefold())
    count = max(len(words) - SHINGLE_WORDS + 1, 1)
    return frozenset(" ".join(words[i : i + SHINGLE_WORDS]) for i in range(count))


def near_duplicates(
    domain: str, train_texts: Sequence[str], eval_texts: Sequence[str]
) -> frozenset[int]:
    """Indices of the training documents that resemble some document of the evaluation.

    Candidates come from a MinHash index (Broder 1997) of the evaluation's documents, and count if
    the Jaccard index of the `shingles` themselves reaches `SIMILARITY`.
    """
    from datasketch import MinHashLSH

    index = MinHashLSH(num_perm=BANDS * ROWS_PER_BAND, params=(BANDS, ROWS_PER_BAND))
    known = [shingles(text) for text in eval_texts]
    with progress_bar(f"near-duplicates in {domain}", len(known) + len(train_texts)) as advance:
        for i, document in enumerate(known):
            index.insert(i, _sketch(document))
            advance(1)
        found = set()
        for i, text in enumerate(train_texts):
            document = shingles(text)
            candidates = (known[j] for j in index.query(_sketch(document)))
            if any(jaccard(document, other) >= SIMILARITY for other in candidates):
                found.add(i)
            advance(1)
    return frozenset(found)


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Common elements over all elements of two sets that are not both empty."""
    common = len(first & second)
    return common / (len(first) + len(second) - common)


def without_near_duplicates(
    domain: str, split: Split, eval_texts: Sequence[str], *, drop: bool
) -> Split:
    """`split` with the near-duplicates of `eval_texts`, those of every domain, counted, and dropped
    from the train split if `drop`.

    Raises `ValueError` naming the domain and the flag if nothing would be left to train on.
    """
    found = near_duplicates(domain, split.train, eval_texts)
    if found:
        _log.log(
            logging.INFO if drop else logging.WARNING,
            "%s: %d of %d training documents are near-duplicates of evaluation documents: %s",
            domain,
            len(found),
            len(split.train),
            "dropped" if drop else "kept (--near-duplicates drop drops them)",
        )
    split = replace(split, near_duplicates=len(found))
    if not drop:
        return split
    kept = [text for i, text in enumerate(split.train) if i not in found]
    if not kept:
        raise ValueError(
            f"{domain}: every training document is a near-duplicate of one of the evaluation; give "
            "more text with --data, or --near-duplicates keep"
        )
    return replace(split, train=kept)


def _sketch(document: frozenset[str]) -> "MinHash":
    from datasketch import MinHash

    sketch = MinHash(num_perm=BANDS * ROWS_PER_BAND)
    sketch.update_batch([shingle.encode("utf-8") for shingle in document])
    return sketch

"""What every source returns: the texts of one domain and where they came from."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from moe_emergence.progress import progress_bar

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DomainTexts:
    """Texts of one domain in the order they were read, and their provenance for the manifest."""

    texts: list[str]
    source: dict[str, Any]


def take_texts(domain: str, texts: Iterable[str], limit_bytes: int) -> list[str]:
    """The first texts that together hold at most `limit_bytes` bytes of UTF-8, in order.

    Blank texts are dropped. A text larger than half the limit is passed over, because a split
    needs two documents. Reading ends at the first other text that would cross the limit.
    """
    taken: list[str] = []
    size = blank = oversized = 0
    with progress_bar(f"reading {domain}", limit_bytes) as advance:
        for text in texts:
            if not text.strip():
                blank += 1
                continue
            length = len(text.encode("utf-8"))
            if 2 * length > limit_bytes:
                oversized += 1
                continue
            if size + length > limit_bytes:
                break
            taken.append(text)
            size += length
            advance(length)
    if blank:
        logger.info("%s: %d blank texts dropped", domain, blank)
    if oversized:
        logger.warning("%s: %d texts larger than half of --size-mb passed over", domain, oversized)
    return taken

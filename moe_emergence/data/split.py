"""Train and evaluation documents: duplicates grouped first, then split by content and seed."""

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

EVAL_PERCENT = 5
EVAL_MOST_PERCENT = 10
EVAL_LEAST = 10
QUOTED_CHARS = 60


@dataclass(frozen=True)
class Split:
    """Distinct documents of one domain."""

    train: list[str]
    eval: list[str]
    duplicates_dropped: int
    """Copies left out to make the documents distinct."""
    near_duplicates: int = 0
    """Training documents that resemble an evaluation document of any domain, dropped or not."""


def eval_count(n: int) -> int:
    """How many of `n` distinct documents are for evaluation.

    5 percent, rounded down; at least 10 where that is no more than 10 percent, otherwise 10
    percent, rounded down; and at least 1, which for n < 10 is more than 10 percent. Never all.
    Raises `ValueError` for n < 2.
    """
    if n < 2:
        raise ValueError(f"a split needs at least 2 distinct documents, not {n}")
    wanted = max(EVAL_LEAST, n * EVAL_PERCENT // 100)
    return max(1, min(wanted, n * EVAL_MOST_PERCENT // 100))


def identity(text: str) -> str:
    """What a reader sees of a text: without a byte order mark, with Unix line ends and composed
    characters (Unicode NFC), and without white space around it."""
    unified = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", unified).strip()


def split_texts(domain: str, texts: Iterable[str], seed: int) -> Split:
    """Keep one copy of every text and split at text level.

    Texts of one `identity` are copies, of which the least is kept, as it is.
    Documents are ordered by a hash of content and seed: the order they came in does not matter,
    and neighbours in the source do not stay neighbours. The first `eval_count` are for evaluation.
    Raises `ValueError` naming the domain if there are fewer than 2 distinct texts.
    """
    copies = list(texts)
    key = seed.to_bytes(8, "little")

    def rank(text: str) -> bytes:
        return hashlib.blake2b(text.encode("utf-8"), digest_size=32, key=key).digest()

    kept: dict[str, str] = {}
    for text in set(copies):
        name = identity(text)
        kept[name] = min(kept.get(name, text), text)
    distinct = sorted(kept.values(), key=rank)
    if len(distinct) < 2:
        raise ValueError(
            f"{domain}: a split needs at least 2 distinct documents, not {len(distinct)}; raise "
            "--size-mb or give more text with --data"
        )
    count = eval_count(len(distinct))
    return Split(distinct[count:], distinct[:count], len(copies) - len(distinct))


def check_no_leakage(domain: str, train_texts: Sequence[str], eval_texts: Sequence[str]) -> None:
    """Raise `ValueError` if a document of the evaluation split is in the train split as well.

    Documents are compared by `identity`. The message quotes the beginning of the first offender.
    """

    def digest(text: str) -> bytes:
        return hashlib.sha256(identity(text).encode("utf-8")).digest()

    train = {digest(text) for text in train_texts}
    for text in eval_texts:
        if digest(text) in train:
            raise ValueError(
                f"{domain}: a document of the evaluation split is in the train split as well: "
                f"{text[:QUOTED_CHARS]!r}; keep it in one of them"
            )

"""The text of a run."""

from dataclasses import dataclass
from typing import Literal

from moe_emergence.settings import check

DOMAINS = ("code", "math", "prose")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data: where the three domains come from and how they become blocks of tokens."""

    data: str = "hub"
    """Source: "embedded" (text that ships with Python packages), "hub" (Hugging Face), or a folder
    with one file or sub-folder per domain, or with prepared blocks."""
    size_mb: float = 10.0
    """Text to read per domain, in megabytes (10^6 bytes of UTF-8)."""
    block_size: int = 512
    """Tokens per training sequence."""
    split_seed: int | None = None
    """Seed of the sources' order, the split and the blocks, so that runs of other seeds share them;
    none takes --seed."""
    balance_tokens: bool = True
    """Give every domain the same number of training blocks (shuffle, then truncate)."""
    near_duplicates: Literal["drop", "keep"] = "drop"
    """Training documents that are almost an evaluation document (Jaccard index of five-word
    shingles from 0.8 on): drop them, or keep and only count them."""
    tokenizer: str = "gpt2"
    """Tokenizer: "gpt2" (from the hub), "smollm2", a folder with a tokenizer, or "train"
    (byte-level BPE on the train split)."""
    vocab_size: int = 4096
    """Vocabulary of a tokenizer trained here, end-of-text token included."""
    text_field: str = "text"
    """Field that holds the text in jsonl and parquet files of a data folder."""
    hub_revision: tuple[str, ...] = ()
    """Hub revisions as domain=revision, for example code=main; a domain not named uses its default.
    """
    cache_dir: str = ".cache"
    """Folder for everything that is downloaded or trained once and reused."""

    def __post_init__(self) -> None:
        check(self.size_mb > 0, "--size-mb", self.size_mb, "give a positive number of megabytes")
        check(self.block_size >= 2, "--block-size", self.block_size, "give at least 2 tokens")
        check(
            self.vocab_size >= 257,
            "--vocab-size",
            self.vocab_size,
            "give at least 257 (256 bytes and the end-of-text token)",
        )
        check(
            self.split_seed is None or 0 <= self.split_seed < 2**31,
            "--split-seed",
            self.split_seed,
            "give a number from 0 to 2^31 - 1",
        )
        check(bool(self.data), "--data", repr(self.data), 'give "embedded", "hub" or a folder')
        for pair in self.hub_revision:
            domain, separator, revision = pair.partition("=")
            check(
                domain in DOMAINS and bool(separator) and bool(revision),
                "--hub-revision",
                pair,
                f"give domain=revision with a domain from {', '.join(DOMAINS)}",
            )

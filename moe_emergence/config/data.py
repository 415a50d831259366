"""The text of a run."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

from moe_emergence.settings import check

SHIPPED = ("code", "math", "prose")
"""Domains of the sources "embedded" and "hub"; a folder has those that it has."""
ALL = "all"
"""In tables, the name of all domains together."""
TokenClass: TypeAlias = Literal["python", "math", "words", "none"]
"""How the tokens of a domain are told apart: as Python's own tokenizer does, as numbers, operators
and words, as English words, or not at all."""
RESERVED = (ALL, "none", "random")
"""What tables write in the place of a domain."""
_NOT_IN_A_NAME = frozenset('/\\=*?"<>|:$')
LONGEST_NAME = 60
MOST_MB = 10**9
MOST_TOKENS = 10**6
"""The trainer of a vocabulary takes memory for all of it at once."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data: where the domains come from and how they become blocks of tokens."""

    data: str = "hub"
    """Source: "embedded" (text that ships with Python packages), "hub" (Hugging Face), a folder
    with one file or sub-folder per domain, a single file, a data set that `datasets` saved, or a
    folder of prepared blocks."""
    domains: tuple[str, ...] = ()
    """Domains to take of the source, in this order; none takes all it has, by name."""
    domain_field: str | None = None
    """Field that names the domain of every row, where --data holds them mixed."""
    token_types: tuple[str, ...] = ()
    """How the tokens of a domain are told apart, as domain=python, math, words (English) or none; a
    domain not named is guessed from its text."""
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
    """Field that holds the text of a row."""
    hub_revision: tuple[str, ...] = ()
    """Hub revisions as domain=revision, for example code=main; a domain not named uses its default.
    """
    cache_dir: str = ".cache"
    """Folder for everything that is downloaded or trained once and reused."""

    def __post_init__(self) -> None:
        check(
            0 < self.size_mb <= MOST_MB,
            "--size-mb",
            self.size_mb,
            f"give a positive number of megabytes, at most {MOST_MB:,}",
        )
        check(self.block_size >= 2, "--block-size", self.block_size, "give at least 2 tokens")
        check(
            257 <= self.vocab_size <= MOST_TOKENS,
            "--vocab-size",
            self.vocab_size,
            f"give 257 (256 bytes and the end-of-text token) to {MOST_TOKENS:,}",
        )
        check(
            self.split_seed is None or 0 <= self.split_seed < 2**31,
            "--split-seed",
            self.split_seed,
            "give a number from 0 to 2^31 - 1",
        )
        check(bool(self.data), "--data", repr(self.data), 'give "embedded", "hub" or a folder')
        check_domain_names(self.domains, "--domains")
        if self.data in ("embedded", "hub"):
            unknown = [domain for domain in self.domains if domain not in SHIPPED]
            check(
                not unknown,
                "--domains",
                " ".join(unknown),
                f"--data {self.data} has {', '.join(SHIPPED)}; choose from these",
            )
            check(
                self.domain_field is None,
                "--domain-field",
                self.domain_field,
                f"the domains of --data {self.data} are apart already; leave it out",
            )
        for pair in self.hub_revision:
            domain, separator, revision = pair.partition("=")
            check(
                domain in SHIPPED and bool(separator) and bool(revision),
                "--hub-revision",
                pair,
                f"give domain=revision with a domain from {', '.join(SHIPPED)}",
            )
        token_classes(self.token_types)


def check_domain_names(names: tuple[str, ...], flag: str) -> None:
    """Refuse names that are double, or that cannot stand in metrics, flags and file names."""
    for name in names:
        fits = name.isprintable() and not _NOT_IN_A_NAME & set(name) and name == name.strip()
        check(
            0 < len(name) <= LONGEST_NAME
            and fits
            and name[0] not in ".-+@"
            and name not in RESERVED,
            flag,
            repr(name),
            f"a domain's name has 1 to {LONGEST_NAME} characters, none of "
            f"{' '.join(sorted(_NOT_IN_A_NAME))}, none of . - + @ in front, and is not "
            f"{' or '.join(RESERVED)}",
        )
    check(len(set(names)) == len(names), flag, " ".join(names), "name each domain once")


def token_classes(pairs: tuple[str, ...]) -> dict[str, TokenClass]:
    """What `--token-types` says, by domain; `ValueError` for what is no domain=class."""
    found: dict[str, TokenClass] = {}
    for pair in pairs:
        domain, _, name = pair.rpartition("=")
        check(
            bool(domain) and name in get_args(TokenClass) and domain not in found,
            "--token-types",
            pair,
            f"give each domain once, as domain=CLASS with {', '.join(get_args(TokenClass))}",
        )
        found[domain] = cast(TokenClass, name)
    return found

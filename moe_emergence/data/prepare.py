"""From a data configuration to blocks of tokens: read, split, tokenise, pack, balance, describe."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from moe_emergence.config import DataConfig, TokenClass
from moe_emergence.config.data import token_classes
from moe_emergence.data.manifest import describe_split
from moe_emergence.data.near_duplicates import without_near_duplicates
from moe_emergence.data.packing import (
    Blocks,
    PackedBlocks,
    balance,
    check_blocks,
    pack,
    warn_if_unbalanced,
)
from moe_emergence.data.prepared import PreparedData, is_prepared, load_prepared
from moe_emergence.data.samples import samples, unlike
from moe_emergence.data.sources import read_sources
from moe_emergence.data.split import Split, check_no_leakage, split_texts
from moe_emergence.data.texts import DomainTexts
from moe_emergence.data.token_class import guess_token_class
from moe_emergence.data.tokenizer import encode_documents, hash_tokenizer, load_tokenizer
from moe_emergence.settings import check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


def prepare_data(config: DataConfig, seed: int) -> PreparedData:
    """Read the texts and make the blocks; the same configuration and seed make the same blocks.

    The seed is that of the run; `config.split_seed` takes its place where there is one.

    Raises `ValueError` naming the flag, file or domain for whatever cannot be read or is too small.
    """
    seed = seed if config.split_seed is None else config.split_seed
    if is_prepared(config.data):
        return load_prepared(config, seed)
    # A tokenizer that is not there should not be found out after minutes of reading.
    ready = None if config.tokenizer == "train" else load_tokenizer(config, ())
    sources = read_sources(config, seed)
    classes = classify(sources, config.token_types)
    splits = split_domains(sources, seed, config)
    all_train = [text for split in splits.values() for text in split.train]
    tokenizer = ready or load_tokenizer(config, all_train)

    train = pack_split(tokenizer, {d: s.train for d, s in splits.items()}, "train", config)
    evaluation = pack_split(tokenizer, {d: s.eval for d, s in splits.items()}, "evaluation", config)
    train_blocks = {domain: packed.blocks for domain, packed in train.items()}
    if config.balance_tokens:
        train_blocks = balance(train_blocks, seed)
    else:
        warn_if_unbalanced(train_blocks)

    manifest: dict[str, Any] = {
        "block_size": config.block_size,
        "seed": seed,
        "balance_tokens": config.balance_tokens,
        "near_duplicates": config.near_duplicates,
        "tokenizer": {
            "kind": config.tokenizer,
            "vocab_size": len(tokenizer),
            "sha256": hash_tokenizer(tokenizer),
        },
        "domains": {
            domain: describe_domain(
                sources[domain],
                samples(tokenizer, train[domain].blocks),
                splits[domain],
                train[domain],
                train_blocks[domain],
                evaluation[domain],
            )
            | {"token_types": classes[domain]}
            for domain in sources
        },
    }
    poor = {d: entry["eval"]["poor_blocks"] for d, entry in manifest["domains"].items()}
    for warning in unlike(poor).values():
        logger.warning("%s", warning)
    return PreparedData(
        tokenizer=tokenizer,
        train_blocks={d: torch.from_numpy(blocks) for d, blocks in train_blocks.items()},
        eval_blocks={d: torch.from_numpy(packed.blocks) for d, packed in evaluation.items()},
        manifest=manifest,
    )


def classify(sources: Mapping[str, DomainTexts], said: tuple[str, ...]) -> dict[str, TokenClass]:
    """Per domain how its tokens are told apart: as `--token-types` says, else guessed, and shown.

    Raises `ValueError` for a domain that is not there.
    """
    classes = token_classes(said)
    for domain in classes:
        check(domain in sources, "--token-types", domain, f"the domains are {', '.join(sources)}")
    for domain, source in sources.items():
        if domain not in classes:
            classes[domain] = guess_token_class(source.texts)
    found = " ".join(f"{domain}={classes[domain]}" for domain in sources)
    logger.info("types of tokens are told as in --token-types %s", found)
    return classes


def split_domains(
    sources: Mapping[str, DomainTexts], seed: int, config: DataConfig
) -> dict[str, Split]:
    """Of every domain documents to train on and others, unlike all of those, to evaluate on."""
    splits = {domain: split_texts(domain, of.texts, seed) for domain, of in sources.items()}
    for domain, split in splits.items():
        check_no_leakage(domain, split.train, split.eval)
    evaluation = [text for split in splits.values() for text in split.eval]
    drop = config.near_duplicates == "drop"
    return {d: without_near_duplicates(d, s, evaluation, drop=drop) for d, s in splits.items()}


def pack_split(
    tokenizer: "PreTrainedTokenizerFast",
    texts: Mapping[str, list[str]],
    split: str,
    config: DataConfig,
) -> dict[str, PackedBlocks]:
    """Tokenise and pack one split of every domain; `ValueError` if one fills no block."""
    eos_id = tokenizer.eos_token_id
    assert isinstance(eos_id, int)
    packed: dict[str, PackedBlocks] = {}
    for domain, documents in texts.items():
        token_lists = encode_documents(tokenizer, documents, f"tokenising {domain} ({split})")
        packed[domain] = pack(token_lists, eos_id, config.block_size)
        check_blocks(domain, split, packed[domain])
    return packed


def describe_domain(
    texts: DomainTexts,
    excerpts: list[str],
    split: Split,
    train: PackedBlocks,
    train_blocks: Blocks,
    evaluation: PackedBlocks,
) -> dict[str, Any]:
    """The manifest's entry of one domain."""
    return {
        "source": texts.source,
        "samples": excerpts,
        "duplicates_dropped": split.duplicates_dropped,
        "near_duplicates": split.near_duplicates,
        "train": describe_split(split.train, train, train_blocks),
        "eval": describe_split(split.eval, evaluation, evaluation.blocks),
    }

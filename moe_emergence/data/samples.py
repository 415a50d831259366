"""What a domain looks like: a few lines of it to read, and whether its blocks are alike."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moe_emergence.data.packing import Blocks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES = 3
SAMPLE_CHARACTERS = 200
POOR = 0.5
"""A block is poor in tokens when it has fewer distinct ones than this share of what the domain's
richest tenth of blocks has."""
MOST_POOR = 0.2

TOKENS_TO_CLUSTER = 16_384

logger = logging.getLogger(__name__)


def samples(tokenizer: "PreTrainedTokenizerBase", blocks: Blocks | Tensor) -> list[str]:
    """The beginnings of three blocks, evenly spaced among those given, as text."""
    places = np.linspace(0, len(blocks) - 1, min(SAMPLES, len(blocks))).astype(int)
    texts = (str(tokenizer.decode(blocks[place].tolist())) for place in places)
    return [text[:SAMPLE_CHARACTERS] for text in texts]


def poor_share(blocks: Blocks | Tensor) -> float:
    """Share of the blocks (N, L) that have few distinct tokens for their domain, 0 to 1.

    Tables of numbers, generated text and repeated boilerplate show here, since they have half as
    many distinct tokens or fewer; more than a fifth of such blocks makes a domain's mean a mean of
    two things.
    """
    in_order = np.sort(np.asarray(blocks), axis=1)
    distinct = 1 + (in_order[:, 1:] != in_order[:, :-1]).sum(axis=1)
    return float((distinct < POOR * np.quantile(distinct, 0.9)).mean())


def unlike(shares: Mapping[str, float]) -> dict[str, str]:
    """A warning for each domain whose blocks are unlike each other, from `poor_share` of each."""
    return {
        domain: f"{domain}: {share:.0%} of the blocks have less than half as many distinct tokens "
        "as its richest tenth: tables, generated or repeated text beside the rest; read the samples"
        for domain, share in shares.items()
        if share > MOST_POOR
    }


def text_to_cluster(blocks: Mapping[str, Tensor], seed: int) -> dict[str, tuple[Tensor, ...]]:
    """Per domain batches (B, L) of training text drawn by seed, 16,384 tokens in equal parts."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for domain, part in blocks.items():
        rows = max(1, TOKENS_TO_CLUSTER // (len(blocks) * part.shape[1]))
        chosen = torch.randperm(len(part), generator=generator)[:rows]
        found[domain] = part[chosen].split(8)
    return found

"""The tables of one source: where its tokens go, and what its experts are for."""

import logging

import pandas as pd
from torch import Tensor

from moe_emergence.analysis.checkpoints import over_checkpoints
from moe_emergence.analysis.counts import RoutingCounts
from moe_emergence.analysis.documents import take
from moe_emergence.analysis.information_table import Resampling, information_table
from moe_emergence.analysis.knockout import knockout_table
from moe_emergence.analysis.loading import Placement, load_model
from moe_emergence.analysis.passages import passage_table
from moe_emergence.analysis.routers import RouterReader
from moe_emergence.analysis.routing_tables import (
    coactivation,
    expert_domain,
    expert_load,
    expert_token_type,
    routing_summary,
)
from moe_emergence.analysis.settings import AnalyzeConfig
from moe_emergence.analysis.similarity import compare_experts, sample_ids
from moe_emergence.analysis.sources import (
    Source,
)
from moe_emergence.analysis.streaming import count_routing, is_byte_level
from moe_emergence.analysis.training_curves import training_tables
from moe_emergence.analysis.vocabulary import vocabulary_tables
from moe_emergence.config import TokenClass

logger = logging.getLogger(__name__)

Tables = dict[str, pd.DataFrame]


def routing_of(
    source: Source,
    reader: RouterReader,
    blocks: dict[str, Tensor],
    classes: dict[str, TokenClass],
    config: AnalyzeConfig,
) -> RoutingCounts:
    """Where the tokens of the text go, and their loss."""
    readable = is_byte_level(source.tokenizer)
    if not readable:
        logger.warning("%s: no token types, its tokenizer is not a byte-level one", source.name)
    return count_routing(
        reader,
        blocks,
        source.tokenizer if readable else None,
        classes,
        batch_size=config.batch_size,
        seed=config.seed,
    )


def routing_tables(source: Source, counted: RoutingCounts, config: AnalyzeConfig) -> Tables:
    """What is to be told of where tokens go."""
    vocabulary, specialisation = vocabulary_tables(
        counted.layers, lambda token: str(source.tokenizer.decode([token]))
    )
    resampling = Resampling(permutations=config.permutations, seed=config.seed)
    return {
        "expert_domain": expert_domain(counted.layers),
        "expert_token_type": expert_token_type(counted.layers),
        "information": information_table(counted.layers, resampling),
        "routing": routing_summary(counted.layers),
        "expert_load": expert_load(counted.layers),
        "coactivation": coactivation(counted),
        "passages": passage_table(counted.passages, tuple(counted.classes), source.tokenizer),
        "vocabulary": vocabulary,
        "vocabulary_specialisation": specialisation,
    }


def model_tables(
    source: Source,
    reader: RouterReader,
    blocks: dict[str, Tensor],
    config: AnalyzeConfig,
    num_experts: int,
    placement: Placement,
) -> Tables:
    """What the experts are, what they are for, and how they came about."""
    few = take(blocks, config.knockout_tokens or 6_000)
    tables: Tables = {}
    base = None
    if source.run is not None and (source.run.root / "dense-base/final-model").is_dir():
        base, _ = load_model(str(source.run.root / "dense-base/final-model"), placement)
    if any(weight.is_meta for weight in source.model.parameters()):
        logger.warning("%s: experts are not compared, weights are offloaded", source.name)
    else:
        alike = compare_experts(reader, sample_ids([few[d] for d in few], 2), base)
        tables |= {"similarity": alike.similarity, "movement": alike.movement}
    if config.knockout_tokens:
        tables["knockout"] = knockout_table(
            source.model, few, num_experts, batch_size=config.batch_size
        )
    if source.run is not None:
        over = over_checkpoints(source.run, few, placement, batch_size=config.batch_size)
        tables |= vars(over)
    if source.metrics is not None:
        tables |= training_tables(source.metrics)
    return tables

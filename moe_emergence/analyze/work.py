"""From sources and settings to the folder of an analysis: tables, figures and one page."""

import logging
import platform
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from torch import Tensor

from moe_emergence.analysis.checkpoints import over_checkpoints
from moe_emergence.analysis.counts import RoutingCounts
from moe_emergence.analysis.diff import diff
from moe_emergence.analysis.documents import take
from moe_emergence.analysis.explorer import explore, own_text
from moe_emergence.analysis.figures import write_figures
from moe_emergence.analysis.gallery import write_gallery
from moe_emergence.analysis.information_table import Resampling, information_table
from moe_emergence.analysis.knockout import knockout_table, mean_losses
from moe_emergence.analysis.loading import Placement, load_model
from moe_emergence.analysis.module_sets import Naming
from moe_emergence.analysis.module_test import modules_of
from moe_emergence.analysis.passages import passage_table
from moe_emergence.analysis.report import print_findings, write_report
from moe_emergence.analysis.retention import best_experts
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
    Text,
    open_source,
    read_text,
    text_choice,
)
from moe_emergence.analysis.streaming import count_routing, is_byte_level
from moe_emergence.analysis.tidy import write_tables
from moe_emergence.analysis.training_curves import training_tables
from moe_emergence.analysis.vocabulary import vocabulary_tables
from moe_emergence.begin import begin
from moe_emergence.config import TokenClass
from moe_emergence.config.data import ALL
from moe_emergence.data.samples import poor_share, samples, unlike
from moe_emergence.models import MixtureModel
from moe_emergence.models.pruning import keep_experts
from moe_emergence.run_folder import read_json, write_json
from moe_emergence.settings import check
from moe_emergence.training.checkpoint import save_model_folder

logger = logging.getLogger(__name__)


Tables = dict[str, pd.DataFrame]


def report(config: AnalyzeConfig, command: str) -> int:
    """Analyse and draw, as `command` asked; print what was found and where the report is."""
    begin()
    folder = output_folder(config)
    if config.diff:
        diff(config, source_names(config.sources), folder)
        logger.info("tables and figures are in %s", folder)
        return 0
    analyze(config, folder, command)
    write_figures(folder)
    if config.gallery:
        write_gallery(folder, Path(config.gallery))
    print_findings(folder, write_report(folder))
    return 0


def output_folder(config: AnalyzeConfig) -> Path:
    """`--out`, else `analysis` in the one folder given, else a folder in runs/analysis."""
    if config.out:
        return Path(config.out)
    if len(config.sources) == 1 and Path(config.sources[0]).is_dir():
        return Path(config.sources[0]) / "analysis"
    return (
        Path("runs/diff" if config.diff else "runs/analysis")
        / "-".join(source_names(config.sources))[:80]
    )


def analyze(config: AnalyzeConfig, folder: Path, command: str) -> None:
    """Write tables, figures, `explorer.json`, `analysis.json` and the report into `folder`."""
    placement = Placement(config.device, config.dtype)
    tables: dict[str, list[pd.DataFrame]] = {}
    about: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    data, domains = "", list[str]()
    read: dict[str, Any] = {}
    choice = text_choice(config)
    for place, name in zip(config.sources, source_names(config.sources), strict=True):
        source = open_source(place, name, placement)
        reader = RouterReader(source.model)
        text = read_text(source, choice)
        check_domains(text, config)
        data = text.description
        blocks = take(text.blocks, config.max_tokens)
        domains = list(dict.fromkeys([*domains, *blocks]))
        read |= text_read(source, blocks)
        counted = routing_of(source, reader, blocks, text.classes, config)
        found = routing_tables(source, counted, config)
        num_experts = int(found["expert_load"]["expert"].nunique())
        found |= model_tables(source, reader, blocks, config, num_experts, placement)
        if config.test == "modules":
            tested, naming = modules_of(source, text, config)
            found |= tested
            for domain in config.keep_experts:
                write_kept(source, reader, naming, domain, config.keep, folder / f"kept-{domain}")
        about.append(describe(source, reader, blocks, counted, found))
        length = max(part.shape[1] for part in blocks.values())
        own = own_text(Path(config.text), source.tokenizer, length) if config.text else None
        texts.append({"name": name, **explore(reader, blocks, source.tokenizer, own)})
        for key, table in found.items():
            tables.setdefault(key, []).append(table.assign(run=name))
    joined = {key: pd.concat(parts, ignore_index=True) for key, parts in tables.items()}
    write_tables(folder, {key: run_first(table) for key, table in joined.items()})
    write_json(folder / "explorer.json", {"runs": texts})
    write_json(
        folder / "analysis.json",
        {
            "command": command,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "runs": about,
            "domains": domains,
            "tokens": max(run["tokens"] for run in about),
            "data": data,
            "read": read,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        },
    )


def text_read(source: Source, blocks: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """For each domain lines to read, and its share of blocks poor in tokens; warns of many."""
    shares = {domain: poor_share(part) for domain, part in blocks.items()}
    warnings = unlike(shares)
    for warning in warnings.values():
        logger.warning("%s: %s", source.name, warning)
    return {
        domain: {
            "samples": samples(source.tokenizer, part),
            "poor_blocks": round(shares[domain], 4),
            "warning": warnings.get(domain),
        }
        for domain, part in blocks.items()
    }


def check_domains(text: Text, config: AnalyzeConfig) -> None:
    """Refuse domains to keep the experts of that the text does not have."""
    unknown = [domain for domain in config.keep_experts if domain not in text.blocks]
    check(not unknown, "--keep-experts", " ".join(unknown), f"choose from {', '.join(text.blocks)}")


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


def write_kept(
    source: Source, reader: RouterReader, naming: Naming, domain: str, keep: int, folder: Path
) -> None:
    """A model folder with the experts of each layer that the domain loses most without."""
    if not isinstance(source.model, MixtureModel):
        raise ValueError(
            f"--keep-experts {domain}: {source.name} is a {type(source.model).__name__}; only "
            "mixtures of this package can be cut"
        )
    best = best_experts(naming, domain, keep)
    try:
        kept = keep_experts(source.model, dict(zip(reader.layers, best, strict=True)))
    except ValueError as error:
        raise ValueError(f"--keep {keep}: {error}") from error
    save_model_folder(folder, kept, source.tokenizer)
    logger.info("experts of %s are in %s", domain, folder)


def describe(
    source: Source,
    reader: RouterReader,
    blocks: dict[str, Tensor],
    counted: RoutingCounts,
    tables: Tables,
) -> dict[str, Any]:
    """The run's entry in `analysis.json`."""
    load = tables["expert_load"]
    losses = mean_losses(counted.losses, blocks)
    return {
        "name": source.name,
        "source": source.place,
        "kind": source.kind,
        "model_type": source.model.config.model_type,
        "layers": reader.layers,
        "num_experts": int(load["expert"].max()) + 1,
        "top_k": int(load["slot"].max()) + 1,
        "step": source.step,
        "made_by": made_by(source),
        "router": getattr(source.model.config, "router", None),
        "tokens": sum(part.numel() for part in blocks.values()),
        "lm_loss": losses[ALL][0],
        "lm_loss_by_domain": {d: losses[d][0] for d in losses if d != ALL},
        "eval_blocks": source.config.monitor.eval_blocks if source.config else None,
    }


def made_by(source: Source) -> str | None:
    """The command that the run was started with, where it says."""
    if source.run is None or not source.run.environment.is_file():
        return None
    program, *flags = read_json(source.run.environment).get("command") or [""]
    if not program:
        return None
    name = Path(program).stem.replace("-", "_")
    module = name if name == "moe_emergence" else f"moe_emergence.{name}"
    return f"python -m {module} {shlex.join(flags)}".strip()


def source_names(sources: tuple[str, ...]) -> list[str]:
    """Short names that differ: the last part of each place, with what is before it where needed."""
    parts = [[part for part in Path(place).parts if part not in (".", "/")] for place in sources]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(place[-depth:]) for place in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{place} ({number})" for number, place in enumerate(sources, start=1)]


def run_first(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its column `run` in front."""
    return table[["run", *(column for column in table.columns if column != "run")]]

"""From sources and settings to the folder of an analysis: tables, figures and one page."""

import logging
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers

from moe_emergence.analysis.diff import diff
from moe_emergence.analysis.documents import take
from moe_emergence.analysis.explorer import explore, own_text
from moe_emergence.analysis.figures import write_figures
from moe_emergence.analysis.gallery import write_gallery
from moe_emergence.analysis.loading import Placement
from moe_emergence.analysis.module_sets import Naming
from moe_emergence.analysis.module_test import modules_of
from moe_emergence.analysis.report import print_findings, write_report
from moe_emergence.analysis.retention import best_experts
from moe_emergence.analysis.routers import RouterReader
from moe_emergence.analysis.settings import AnalyzeConfig
from moe_emergence.analysis.sources import (
    Source,
    Text,
    open_source,
    read_text,
    text_choice,
)
from moe_emergence.analysis.tidy import write_tables
from moe_emergence.analyze.describe import describe, source_names, text_read
from moe_emergence.analyze.tables import model_tables, routing_of, routing_tables
from moe_emergence.begin import begin
from moe_emergence.disk import clear_unfinished
from moe_emergence.models import MixtureModel
from moe_emergence.models.pruning import keep_experts
from moe_emergence.run_folder import write_json
from moe_emergence.settings import check
from moe_emergence.training.checkpoint import save_model_folder

logger = logging.getLogger(__name__)


def report(config: AnalyzeConfig, command: str) -> int:
    """Analyse and draw, as `command` asked; print what was found and where the report is."""
    begin()
    folder = output_folder(config)
    clear_unfinished(folder)
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


def check_domains(text: Text, config: AnalyzeConfig) -> None:
    """Refuse domains to keep the experts of that the text does not have."""
    unknown = [domain for domain in config.keep_experts if domain not in text.blocks]
    check(not unknown, "--keep-experts", " ".join(unknown), f"choose from {', '.join(text.blocks)}")


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


def run_first(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its column `run` in front."""
    return table[["run", *(column for column in table.columns if column != "run")]]

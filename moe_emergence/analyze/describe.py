"""What an analysis says of a source beside its tables: names, losses, the text that was read."""

import logging
import shlex
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from moe_emergence.analysis.counts import RoutingCounts
from moe_emergence.analysis.knockout import mean_losses
from moe_emergence.analysis.routers import RouterReader
from moe_emergence.analysis.sources import (
    Source,
)
from moe_emergence.config.data import ALL
from moe_emergence.data.samples import poor_share, samples, unlike
from moe_emergence.run_folder import read_json

logger = logging.getLogger(__name__)


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


def describe(
    source: Source,
    reader: RouterReader,
    blocks: dict[str, Tensor],
    counted: RoutingCounts,
    tables: dict[str, pd.DataFrame],
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
    words = read_json(source.run.environment).get("command") or [""]
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{source.run.environment}: command is no list of words; delete the file")
    program, *flags = words
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

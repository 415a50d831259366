"""Routing over the checkpoints of a run: where it settles, and when."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_emergence.analysis.loading import Placement, load_model
from moe_emergence.analysis.router_gradients import router_gradients
from moe_emergence.analysis.routers import RouterReader
from moe_emergence.progress import progress_bar
from moe_emergence.run_folder import RunFolder

_GRADIENT_BLOCKS = 8


@dataclass(frozen=True)
class OverCheckpoints:
    """`saturation`: step, layer, slots, share (of the assignments that the checkpoint has in common
    with the last one: router saturation, OLMoE, arXiv 2409.02060, section 5.1). `trajectory`: step,
    layer, domain, expert, fraction. `router_gradients`: step, and what `router_gradients` says."""

    saturation: pd.DataFrame
    trajectory: pd.DataFrame
    router_gradients: pd.DataFrame


def over_checkpoints(
    run: RunFolder,
    blocks: Mapping[str, Tensor],
    placement: Placement = Placement(),  # noqa: B008 - frozen
    *,
    batch_size: int = 8,
) -> OverCheckpoints:
    """Route the blocks (R, L) of each domain through every checkpoint; a model at a time.

    The tables are empty where the run kept fewer than two; gradients are on 8 blocks of a domain.
    """
    steps = run.checkpoint_steps()
    if len(steps) < 2:
        return OverCheckpoints(pd.DataFrame(), pd.DataFrame(), pd.DataFrame())
    # domains take turns, so that both halves have all of them
    turns = zip(*(part[:_GRADIENT_BLOCKS] for part in blocks.values()), strict=False)
    mixed = torch.stack([row for turn in turns for row in turn])
    chosen: dict[int, list[Tensor]] = {}
    rows: list[dict[str, Any]] = []
    gradients: list[dict[str, Any]] = []
    with progress_bar("routing of the checkpoints", len(steps)) as advance:
        for step in steps:
            model, _ = load_model(str(run.checkpoint(step)), placement)
            reader = RouterReader(model)
            parts, found = _route(reader, blocks, batch_size)
            chosen[step] = parts
            rows += [{"step": step, **row} for row in found]
            gradients += [{"step": step, **row} for row in router_gradients(model, mixed)]
            advance(1)
    final = chosen[steps[-1]]
    saturation = [
        {"step": step, "layer": layer, "slots": experts.shape[1], "share": _common(experts, last)}
        for step, parts in chosen.items()
        for layer, experts, last in zip(reader.layers, parts, final, strict=True)
    ]
    return OverCheckpoints(pd.DataFrame(saturation), pd.DataFrame(rows), pd.DataFrame(gradients))


def _route(
    reader: RouterReader, blocks: Mapping[str, Tensor], batch_size: int
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Experts (T, K) of every layer, and the rows of `trajectory` without their step."""
    experts: list[list[Tensor]] = [[] for _ in reader.layers]
    rows: list[dict[str, Any]] = []
    with reader.reading():
        for domain, of_domain in blocks.items():
            counts: dict[int, Tensor] = {}
            for part in of_domain.split(batch_size):
                for place, routing in enumerate(reader.read(part) if len(part) else []):
                    experts[place].append(routing.experts_TK.cpu().short())
                    size = routing.probs_TE.shape[1]
                    one = torch.bincount(routing.experts_TK.flatten().cpu(), minlength=size)
                    counts[routing.layer] = counts.get(routing.layer, torch.zeros_like(one)) + one
            rows += [
                {"layer": layer, "domain": domain, "expert": e, "fraction": share}
                for layer, count in counts.items()
                for e, share in enumerate((count / count.sum()).tolist())
            ]
    return [torch.cat(parts) for parts in experts], rows


def _common(experts_TK: Tensor, last_TK: Tensor) -> float:
    """Mean share of a token's experts that it has at the end, whatever their order."""
    same = (experts_TK[:, :, None] == last_TK[:, None, :]).any(dim=2)
    return float(np.mean(same.double().mean(dim=1).numpy()))

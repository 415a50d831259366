"""The routing of a model over blocks of text, as arrays in a file.

Letters: N mixture layers, R blocks, L tokens per block, K experts per token.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from moe_emergence.disk import whole_file
from moe_emergence.models import MixtureModel
from moe_emergence.models.mode import evaluating
from moe_emergence.progress import progress_bar

_KEYS = ("token_ids", "domains", "layers", "experts", "probs_top")


@dataclass(frozen=True, eq=False)
class RoutingRecord:
    """The experts that a model chose for blocks of text, without noise."""

    token_ids: npt.NDArray[np.int32]
    """(R, L)"""
    domains: npt.NDArray[np.int8]
    """(R,) place among the domains of the run's data manifest."""
    layers: npt.NDArray[np.int16]
    """(N,) index in the model."""
    experts: npt.NDArray[np.int16]
    """(N, R, L, K), most probable first."""
    probs_top: npt.NDArray[np.float16]
    """(N, R, L, K) clean router probabilities of those experts."""


@torch.no_grad()
def record_routing(
    model: MixtureModel,
    blocks: Mapping[str, torch.Tensor],
    *,
    max_blocks: int = 0,
    batch_size: int = 16,
) -> RoutingRecord:
    """Route (R, L) blocks per domain through the model, in evaluation mode.

    Args:
        model: on any device; its mode is restored.
        blocks: token ids of each domain.
        max_blocks: per domain, from the first; 0 for all.
        batch_size: blocks in one forward pass.
    """
    device = next(model.parameters()).device
    kept = [part[: max_blocks or None] for part in blocks.values()]
    token_ids = torch.cat(kept)
    domains = np.repeat(np.arange(len(kept), dtype=np.int8), [len(part) for part in kept])
    experts, probs = [], []
    title = "routing of the evaluation blocks"
    with evaluating(model), progress_bar(title, len(token_ids)) as advance:
        for batch in token_ids.split(batch_size):
            decisions = model(input_ids=batch.long().to(device), use_cache=False).router_decisions
            chosen = torch.stack([d.topk_experts for d in decisions])
            top = torch.stack([d.router_probs.gather(1, d.topk_experts) for d in decisions])
            shape = (len(decisions), *batch.shape, -1)
            experts.append(chosen.reshape(shape).short().cpu().numpy())
            probs.append(top.reshape(shape).half().cpu().numpy())
            advance(len(batch))
    return RoutingRecord(
        token_ids.int().cpu().numpy(),
        domains,
        np.array(sorted(model.moe_layers()), dtype=np.int16),
        np.concatenate(experts, axis=1),
        np.concatenate(probs, axis=1),
    )


def save_routing(record: RoutingRecord, path: Path) -> None:
    """Write the record as `.npz`: complete, or not at all.

    Raises:
        RunError: when the disk is full or not writable.
    """
    with whole_file(path) as new, new.open("wb") as file:
        np.savez_compressed(file, **{k: getattr(record, k) for k in _KEYS})


def read_routing(path: Path) -> RoutingRecord:
    """Read what `save_routing` wrote; `ValueError` naming the file when it is not that."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            record = RoutingRecord(*(arrays[key] for key in _KEYS))
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: no routing can be read from it ({error})") from error
    blocks = record.token_ids.shape
    if record.experts.shape[:3] != (len(record.layers), *blocks):
        raise ValueError(f"{path}: experts {record.experts.shape} are not of blocks {blocks}")
    return record

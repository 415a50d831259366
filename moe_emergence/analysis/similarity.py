"""How alike a layer's experts are, and how far they have moved from their common start.

Letters: E experts, P parameters of one expert, T tokens, H model width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_emergence.analysis.routers import RouterInfo, RouterReader
from moe_emergence.models.families import FAMILIES

SAMPLE_TOKENS = 512


@dataclass(frozen=True)
class Similarity:
    """`similarity`: layer, kind, expert, other_expert, cosine. `movement`: layer, expert, start,
    relative_distance (norm of the difference over the start's norm)."""

    similarity: pd.DataFrame
    movement: pd.DataFrame


@torch.no_grad()
def compare_experts(
    reader: RouterReader, token_ids: Tensor, base: nn.Module | None = None
) -> Similarity:
    """Cosines between experts: of their "weights", of what they "moved", of their "outputs".

    They moved from the dense base they were upcycled from, where it is given; else from the mean
    expert, which `start` says. Outputs are those on the same hidden states, what the layer's
    router read for `token_ids` (B, L). Layers whose experts are not stacked are left out.
    """
    with reader.reading():
        hidden = {r.layer: r.hidden_TH[:SAMPLE_TOKENS] for r in reader.read(token_ids)}
    alike: list[dict[str, Any]] = []
    moved: list[dict[str, Any]] = []
    for router in reader.routers:
        layer = _parent(reader.model, router)
        experts = getattr(layer, "experts", None)
        stacked = stacked_weights(experts) if isinstance(experts, nn.Module) else None
        if stacked is None:
            continue
        weights_EP = torch.cat([w.flatten(1).float() for w in stacked.values()], dim=1)
        start_P = _start(stacked, base, router.layer)
        difference = weights_EP - (weights_EP.mean(dim=0) if start_P is None else start_P)
        origin = weights_EP.mean(dim=0) if start_P is None else start_P
        outputs = torch.stack(
            [_output(experts, e, hidden[router.layer]).flatten() for e in range(len(weights_EP))]
        )
        for kind, vectors in (("weights", weights_EP), ("moved", difference), ("outputs", outputs)):
            alike += [
                {
                    "layer": router.layer, "kind": kind, "expert": a, "other_expert": b,
                    "cosine": float(cosine),
                }
                for (a, b), cosine in np.ndenumerate(_cosines(vectors))
            ]  # fmt: skip
        start = "mean expert" if start_P is None else "dense base"
        distances = difference.norm(dim=1) / origin.norm()
        moved += [
            {"layer": router.layer, "expert": e, "start": start, "relative_distance": distance}
            for e, distance in enumerate(distances.tolist())
        ]
    return Similarity(pd.DataFrame(alike), pd.DataFrame(moved))


def stacked_weights(experts: nn.Module) -> dict[str, Tensor] | None:
    """Parameters (E, ...) of stacked experts by name; None where there are none."""
    own = dict(experts.named_parameters(recurse=False))
    wide = [p.shape[0] for p in own.values() if p.ndim == 3]
    return {n: p for n, p in own.items() if p.shape[0] == wide[0]} if wide else None


def _start(stacked: Mapping[str, Tensor], base: nn.Module | None, layer: int) -> Tensor | None:
    """The dense MLP that every expert began as, in the order of `stacked`; None where unknown."""
    family = None if base is None else FAMILIES.get(type(base))
    if base is None or family is None or set(stacked) != set(family.sources):
        return None
    state = base.state_dict()
    parts = {name: torch.cat(family.parts(state, layer, name), dim=-1) for name in stacked}
    if any(parts[name].shape != stacked[name].shape[1:] for name in stacked):
        return None
    flat = torch.cat([parts[name].float().flatten() for name in stacked])
    return flat.to(stacked["w1"].device)


def _parent(model: nn.Module, router: RouterInfo) -> nn.Module:
    return model.get_submodule(router.name.rpartition(".")[0])


def _output(experts: Any, expert: int, hidden_TH: Tensor) -> Tensor:
    """(T, H) of one expert for all tokens, with weight 1."""
    chosen_T1 = torch.full((len(hidden_TH), 1), expert, device=hidden_TH.device)
    ones_T1 = torch.ones_like(chosen_T1, dtype=hidden_TH.dtype)
    output: Tensor = experts(hidden_TH, chosen_T1, ones_T1)
    return output


def _cosines(vectors: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    unit = functional.normalize(vectors.double(), dim=1)
    cosines: np.ndarray[Any, np.dtype[Any]] = (unit @ unit.T).cpu().numpy()
    return cosines


def sample_ids(blocks: Sequence[Tensor], per_domain: int) -> Tensor:
    """The first `per_domain` blocks of every domain, (B, L)."""
    return torch.cat([part[:per_domain] for part in blocks])

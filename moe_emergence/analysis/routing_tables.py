"""Tidy tables of a model's routing from its counts: who goes where, how evenly, how predictably.

Letters: E experts, D domains, K experts per token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from moe_emergence.analysis import information as info
from moe_emergence.analysis.counts import LayerCounts, RoutingCounts
from moe_emergence.analysis.token_types import TOKEN_TYPES

ALL_SLOTS = -1


def expert_load(layers: Sequence[LayerCounts]) -> pd.DataFrame:
    """layer, slot (-1: all), expert, tokens, fraction of the layer's (slot's) assignments."""
    rows: list[dict[str, Any]] = []
    for counts in layers:
        for slot, load in _with_all(counts.slots.sum(axis=0)):
            rows += [
                {"layer": counts.layer, "slot": slot, "expert": e, "tokens": int(n), "fraction": s}
                for e, (n, s) in enumerate(zip(load, _shares(load), strict=True))
            ]
    return pd.DataFrame(rows)


def expert_domain(layers: Sequence[LayerCounts]) -> pd.DataFrame:
    """layer, slot, domain, expert, tokens, fraction of the domain's assignments."""
    rows: list[dict[str, Any]] = []
    for counts in layers:
        for place, domain in enumerate(counts.classes):
            for slot, load in _with_all(counts.slots[place]):
                rows += [
                    {
                        "layer": counts.layer, "slot": slot, "domain": domain, "expert": e,
                        "tokens": int(n), "fraction": s,
                    }
                    for e, (n, s) in enumerate(zip(load, _shares(load), strict=True))
                ]  # fmt: skip
    return pd.DataFrame(rows)


def expert_token_type(layers: Sequence[LayerCounts]) -> pd.DataFrame:
    """layer, slot, domain, token_type, expert, tokens, fraction of the type's assignments."""
    rows: list[dict[str, Any]] = []
    for counts in layers:
        for place, (domain, token_class) in enumerate(counts.classes.items()):
            for kind, name in enumerate(TOKEN_TYPES[token_class]):
                if not counts.types[place, kind].any():
                    continue
                for slot, load in _with_all(counts.types[place, kind]):
                    rows += [
                        {
                            "layer": counts.layer, "slot": slot, "domain": domain,
                            "token_type": name, "expert": e, "tokens": int(n), "fraction": s,
                        }
                        for e, (n, s) in enumerate(zip(load, _shares(load), strict=True))
                    ]  # fmt: skip
    return pd.DataFrame(rows)


def routing_summary(layers: Sequence[LayerCounts]) -> pd.DataFrame:
    """A row per layer.

    `entropy_token` is the mean entropy of a token's probabilities and `entropy_mean` that of their
    mean, in nats; `entropy_uniform` is log E. `max_violation` is the largest load over the mean
    load, less 1 (arXiv 2408.15664, equation 4); `load_cv` their coefficient of variation.
    `persistence` is the share of neighbouring tokens with the same first expert and
    `persistence_expected` what independent draws with the same loads would give.
    `token_id_share` is I(first expert; token id) / H(first expert), less its first-order bias.
    """
    rows = []
    for counts in layers:
        load = counts.load()
        first = _shares(counts.slots.sum(axis=0)[0])
        mean = counts.probs_sum / max(counts.tokens, 1)
        rows.append(
            {
                "layer": counts.layer,
                "entropy_token": counts.entropy_sum / max(counts.tokens, 1),
                "entropy_mean": _entropy(mean),
                "entropy_uniform": float(np.log(counts.num_experts)),
                "top_probability": counts.top_sum / max(counts.tokens, 1),
                "max_violation": float(load.max() * counts.num_experts - 1),
                "load_cv": float(load.std() / load.mean()) if load.any() else float("nan"),
                "persistence": counts.same / max(counts.neighbours, 1),
                "persistence_expected": float((first**2).sum()),
                "token_id_share": token_id_share(counts),
            }
        )
    return pd.DataFrame(rows)


def token_id_table(counts: LayerCounts) -> info.Ints:
    """(V, E) first experts of the V distinct token ids seen."""
    keys, seen = counts.pairs
    ids, row = np.unique(keys // counts.num_experts, return_inverse=True)
    table = np.zeros((len(ids), counts.num_experts), np.int64)
    np.add.at(table, (row, keys % counts.num_experts), seen)
    return table


def token_id_share(counts: LayerCounts) -> float:
    """How much of the first expert the token id alone tells, 0 to 1."""
    table = token_id_table(counts)
    bits = float(info.miller_madow(table))
    entropy = float(info.mutual_information(np.diag(table.sum(axis=0))))
    return min(max(bits / entropy, 0.0), 1.0) if entropy > 0 else float("nan")


def coactivation(counted: RoutingCounts) -> pd.DataFrame:
    """Experts that share tokens (OLMoE, arXiv 2409.02060, section 5.2), within layers and between.

    Within a layer (K >= 2) all K experts of a token count, between one and the next the first.
    layer, other_layer, expert, other_expert, tokens with both, `conditional`: of the tokens of
    `expert` the share that also goes to `other_expert`; `expected`: the share of the layer's
    tokens that goes to `other_expert` at all.
    """
    rows: list[dict[str, Any]] = []
    for counts in counted.layers:
        if counts.top_k > 1:
            own = np.diag(counts.together)
            rows += pair_rows(
                counts.layer, counts.layer, counts.together, own, own / max(counts.tokens, 1)
            )
    for (layer, other), table in counted.between.items():
        total = max(int(table.sum()), 1)
        rows += pair_rows(layer, other, table, table.sum(axis=1), table.sum(axis=0) / total)
    return pd.DataFrame(rows)


def pair_rows(
    layer: int, other: int, together: info.Ints, own: info.Ints, expected: info.Floats
) -> list[dict[str, Any]]:
    """Rows of `coactivation` of two layers; an expert with itself is left out within a layer."""
    return [
        {
            "layer": layer, "other_layer": other, "expert": a, "other_expert": b, "tokens": int(n),
            "conditional": n / own[a] if own[a] else 0.0, "expected": float(expected[b]),
        }
        for (a, b), n in np.ndenumerate(together)
        if layer != other or a != b
    ]  # fmt: skip


def _with_all(slots_KE: info.Ints) -> list[tuple[int, info.Ints]]:
    return [(ALL_SLOTS, slots_KE.sum(axis=0)), *enumerate(slots_KE)]


def _shares(load: info.Ints) -> info.Floats:
    shares: info.Floats = load / max(int(load.sum()), 1)
    return shares


def _entropy(probs: info.Floats) -> float:
    positive = probs[probs > 0]
    return float(-(positive * np.log(positive)).sum())

"""Which experts are a domain's by what it loses without them, and random sets to compare with.

Letters: E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from moe_emergence.analysis.ablation import Floats

CANDIDATES = 4_000

ExpertSet = tuple[tuple[int, ...], ...]
"""The experts of a set in every mixture layer, ascending."""


@dataclass(frozen=True, eq=False)
class Naming:
    """What is known of a model's experts from the text on which modules are named."""

    domains: tuple[str, ...]
    increase: dict[str, Floats]
    """Per domain (layers, E): what it loses without the expert. Nats per token."""
    selectivity: dict[str, Floats]
    """Per domain (layers, E): what the domain loses without the expert, less the mean of what the
    others lose. Nats per token."""
    load: Floats
    """(layers, E) share of the layer's assignments, domains weighted alike."""


def name_modules(knockout: pd.DataFrame, expert_domain: pd.DataFrame) -> Naming:
    """From the tables `knockout` and `expert_domain` of one model on the naming text."""
    each = knockout[knockout["domain"] != "all"]
    domains = tuple(dict.fromkeys(each["domain"]))
    cubes = {
        domain: each[each["domain"] == domain]
        .pivot(index="layer", columns="expert", values="increase")
        .to_numpy()
        for domain in domains
    }
    together = np.stack(list(cubes.values()))
    others = (together.sum(axis=0) - together) / max(len(domains) - 1, 1)
    selectivity = dict(zip(domains, together - others, strict=True))
    of_all = expert_domain[expert_domain["slot"] == -1]
    load = of_all.groupby(["layer", "expert"])["fraction"].mean().unstack().to_numpy()
    return Naming(domains, cubes, selectivity, load)


def most_selective(scores: Floats, size: int) -> ExpertSet:
    """In every layer the `size` experts with the largest of `scores` (layers, E)."""
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, :size]
    return tuple(tuple(sorted(row.tolist())) for row in chosen)


def rivals_of(
    named: Mapping[str, ExpertSet], load: Floats, count: int, seed: int
) -> dict[str, list[ExpertSet]]:
    """For each named set `count` others with as many experts in every layer and about its load.

    Of 4,000 random sets (of all where there are fewer) half as many more than `count` are taken
    whose load is nearest to the mean of those named, so that the names share them; of these each
    gets the nearest to its own.
    """
    rng = np.random.default_rng(seed)
    sizes = [len(layer) for layer in next(iter(named.values()))]
    drawn = {
        tuple(tuple(sorted(rng.permutation(load.shape[1])[:size].tolist())) for size in sizes)
        for _ in range(CANDIDATES)
    }
    mean = float(np.mean([total_load(one, load) for one in named.values()]))
    pool = _nearest(sorted(drawn), load, mean)[: count + count // 2]
    return {
        name: _nearest([one for one in pool if one != own], load, total_load(own, load))[:count]
        for name, own in named.items()
    }


def _nearest(sets: list[ExpertSet], load: Floats, target: float) -> list[ExpertSet]:
    return sorted(sets, key=lambda one: abs(total_load(one, load) - target))


def total_load(chosen: ExpertSet, load: Floats) -> float:
    """Mean over the layers of the share of assignments that go to the set."""
    shares = [load[place, list(experts)].sum() for place, experts in enumerate(chosen)]
    return float(np.mean(shares))

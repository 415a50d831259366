"""Whether the experts of a domain are a module of it: named on one text, taken away on another.

Letters: E experts, S sets of experts, R blocks.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

from moe_emergence.analysis.ablation import Ablation, Floats
from moe_emergence.analysis.documents import Ints, main_documents, resampling_units, spread
from moe_emergence.analysis.knockout import knockout_table
from moe_emergence.analysis.module_sets import (
    ExpertSet,
    Naming,
    most_selective,
    name_modules,
    rivals_of,
    total_load,
)
from moe_emergence.analysis.routers import RouterInfo, RouterReader, find_routers
from moe_emergence.analysis.routing_tables import expert_domain
from moe_emergence.analysis.streaming import count_routing
from moe_emergence.progress import progress_bar

logger = logging.getLogger(__name__)

RANDOM_SETS = 100
SHARE = 0.25
"""Of a layer's experts that make a module."""
ALPHA = 0.05
OFF_TARGET = 1 / 3
OVER_RANDOM = 2.0
RESAMPLES = 1_000


def module_tables(
    model: nn.Module,
    naming: Naming,
    corpora: Mapping[str, Mapping[str, Tensor]],
    *,
    eos_id: int,
    most: int,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """Take the modules named by `naming`, and random sets in their place, out of the model.

    For every domain the quarter of each layer's experts (one at least) that is most selective for
    it is its module. It passes on a text where the domain loses more than without 95% of 100 random
    sets of equal size and nearest load (of all other sets where there are fewer), and the other
    domains lose at most a third of that on average (protocol: arXiv 2606.25092). A domain that any
    ablation hurts most would pass as well, so the domain must also lose at least twice what it
    loses without a random set on average, with an interval above 0 (95%, resampled documents, or
    blocks where a domain's are of fewer than five).

    `modules`: corpus, domain, experts, load, random_load, blocks, documents, damage with interval,
    random_mean, random_95, p, off_target with interval, sets, passes. `module_damage`: corpus,
    domain, on, and the damage there, nats per token.

    Args:
        model: any mixture language model whose routers can be read; its mode is restored.
        naming: of this model, from a text that shares no document with `corpora`.
        corpora: by name, token ids (R, L) of each domain, as the text was cut.
        eos_id: ends every document of `corpora`.
        most: blocks of each domain to test on, evenly apart.
        batch_size: blocks in one forward pass.
        seed: of the random sets and the resampling.
    """
    routers = find_routers(model)
    size = max(1, int(SHARE * naming.load.shape[1]))
    named = {d: most_selective(naming.selectivity[d], size) for d in naming.domains}
    rivals = rivals_of(named, naming.load, RANDOM_SETS, seed)
    if not can_pass(fewest := min(map(len, rivals.values()))):
        logger.warning("modules: %d other sets of experts are too few for one to pass", fewest)
    every = dict.fromkeys([*named.values(), *(one for sets in rivals.values() for one in sets)])
    rows: list[dict[str, Any]] = []
    damages: list[dict[str, Any]] = []
    with progress_bar("modules", (1 + len(every)) * len(corpora)) as advance:
        for corpus, text in corpora.items():
            places = {d: spread(len(part), most) for d, part in text.items()}
            documents = {d: main_documents(text[d], eos_id)[places[d]] for d in text}
            ablation = Ablation(model, {d: text[d][places[d]] for d in text}, batch_size)
            advance(1)
            lost: dict[ExpertSet, dict[str, Floats]] = {}
            for chosen in every:
                losses = ablation.without(dict(zip(routers, chosen, strict=True)))
                lost[chosen] = {d: losses[d] - whole for d, whole in ablation.whole.items()}
                advance(1)
            for domain in named:
                others = [lost[one] for one in rivals[domain]]
                row = judge(domain, lost[named[domain]], others, documents, seed)
                load = [total_load(one, naming.load) for one in rivals[domain]]
                rows.append({
                    "corpus": corpus, "domain": domain,
                    "experts": _written(routers, named[domain]),
                    "load": total_load(named[domain], naming.load),
                    "random_load": float(np.mean(load)) if load else np.nan,
                    "blocks": len(documents[domain]),
                    "documents": len(np.unique(documents[domain])), **row,
                })  # fmt: skip
                damages += [
                    {"corpus": corpus, "domain": domain, "on": on, "damage": float(of.mean())}
                    for on, of in lost[named[domain]].items()
                ]
    return {"modules": pd.DataFrame(rows), "module_damage": pd.DataFrame(damages)}


def can_pass(sets: int) -> bool:
    """Whether a module can be told from so many other sets at all: p is 1 / (1 + sets) at least."""
    return 1 / (1 + sets) < ALPHA


def name_on(model: nn.Module, blocks: Mapping[str, Tensor], *, batch_size: int = 8) -> Naming:
    """What is to be known for the names of modules, from knocking out every expert on `blocks`."""
    counted = count_routing(RouterReader(model), blocks, batch_size=batch_size, null_routers=0)
    alone = knockout_table(model, blocks, counted.layers[0].num_experts, batch_size=batch_size)
    return name_modules(alone, expert_domain(counted.layers))


def halves(blocks: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The first and the second half of each domain's blocks, which share one document at most.

    Raises:
        ValueError: for a domain of less than two blocks.
    """
    short = [domain for domain, part in blocks.items() if len(part) < 2]
    if short:
        raise ValueError(
            f"--test modules: {', '.join(short)}: two blocks at least are needed; give more text"
        )
    half = {domain: len(part) // 2 for domain, part in blocks.items()}
    first = {domain: part[: half[domain]] for domain, part in blocks.items()}
    return first, {domain: part[half[domain] :] for domain, part in blocks.items()}


def judge(
    domain: str,
    named: Mapping[str, Floats],
    rivals: Sequence[Mapping[str, Floats]],
    documents: Mapping[str, Ints],
    seed: int,
) -> dict[str, Any]:
    """Whether what each block (R,) of each domain lost without the module makes it one.

    Args:
        domain: of the module.
        named: losses without the module, less those of the whole model, per domain.
        rivals: the same for random sets.
        documents: per domain, the document of each block.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    damage = float(named[domain].mean())
    off_target = float(np.mean([named[d].mean() for d in named if d != domain]))
    random = np.array([one[domain].mean() for one in rivals])
    limit = float(np.quantile(random, 0.95)) if len(random) else np.nan
    p = (1 + int((random >= damage).sum())) / (1 + len(random))
    resampled = {
        d: _resampled_means(of, resampling_units(documents[d]), rng) for d, of in named.items()
    }
    off = np.mean([resampled[d] for d in resampled if d != domain], axis=0)
    low, high = np.quantile(resampled[domain], [0.025, 0.975])
    off_low, off_high = np.quantile(off, [0.025, 0.975])
    return {
        "damage": damage, "damage_low": float(low), "damage_high": float(high),
        "random_mean": float(random.mean()) if len(random) else np.nan, "random_95": limit,
        "p": p,
        "off_target": off_target, "off_low": float(off_low), "off_high": float(off_high),
        "sets": len(random),
        "passes": bool(
            p < ALPHA
            and low > 0
            and damage > OVER_RANDOM * random.mean()
            and off_target <= OFF_TARGET * damage
        ),
    }  # fmt: skip


def _resampled_means(losses: Floats, units: Ints, rng: np.random.Generator) -> Floats:
    sizes, sums = np.bincount(units), np.bincount(units, losses)
    drawn = rng.integers(0, len(sizes), (RESAMPLES, len(sizes)))
    means: Floats = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return means


def _written(routers: Sequence[RouterInfo], chosen: ExpertSet) -> str:
    """`8: 1 5; 9: 0 2`."""
    parts = [
        f"{router.layer}: {' '.join(map(str, experts))}"
        for router, experts in zip(routers, chosen, strict=True)
    ]
    return "; ".join(parts)

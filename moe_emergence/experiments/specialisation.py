"""Do experts specialise? Information beside what routers carry that cannot have learned to.

Every mixture run gets I(expert; domain) and I(expert; token type | domain) of its final model over
the evaluation blocks, with a permutation null. Variants with a frozen or a hash router are the
null models: a learned router specialises by as much as it exceeds them, seed by seed.

Letters: N mixture layers, R blocks, L tokens per block, K experts per token.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from moe_emergence.analysis import information as info
from moe_emergence.analysis.routing_record import RoutingRecord, read_routing
from moe_emergence.analysis.token_types import NUM_TYPES, TOKEN_TYPES
from moe_emergence.config import TokenClass
from moe_emergence.data.manifest import token_classes_of
from moe_emergence.experiments.collect import ENDED, Records
from moe_emergence.experiments.paired import MIN_SEEDS, holm, paired_difference
from moe_emergence.progress import progress_bar

DOMAIN_LABEL = "domain"
TYPE_LABEL = "token type"
NULL_ROUTERS = ("frozen", "hash")

Classes = Mapping[str, TokenClass]
"""The domains of a run, in order, and how the tokens of each are told apart."""
TypesOf = Callable[[RoutingRecord, int, Classes], npt.NDArray[np.int8] | None]
"""Token types (R, L) of a routing's blocks for a seed; None where they cannot be known."""


@dataclass(frozen=True)
class Resampling:
    """How much is drawn for nulls and intervals, and from which seed."""

    permutations: int = 1000
    bootstrap: int = 1000
    seed: int = 0


def routing_information(
    routing: RoutingRecord,
    types_RL: npt.NDArray[np.int8] | None,
    classes: Classes,
    num_experts: int,
    resampling: Resampling,
) -> Iterator[dict[str, Any]]:
    """Rows of bits, null and interval for every layer and label of one run.

    The labels are the domain, the token type given the domain, and the type within each domain.
    The interval is a bootstrap over blocks: of this model on other text, not of another seed.
    """
    for layer, experts in zip(routing.layers.tolist(), routing.experts, strict=True):
        counts = info.expert_counts(experts, num_experts)
        test = info.domain_null(
            counts, routing.domains, len(classes), resampling.permutations, resampling.seed
        )
        present = np.unique(routing.domains)
        strata = [counts[routing.domains == domain] for domain in present]
        interval = info.bootstrap_interval(
            strata, info.mutual_information, resamples=resampling.bootstrap, seed=resampling.seed
        )
        table = info.domain_table(counts, routing.domains, len(classes))
        yield {"layer": layer, "label": DOMAIN_LABEL, **_row(test, interval, table)}
        if types_RL is not None:
            for row in _type_rows(routing, types_RL, classes, experts, num_experts, resampling):
                yield {"layer": layer, **row}


def _type_rows(
    routing: RoutingRecord,
    types_RL: npt.NDArray[np.int8],
    classes: Classes,
    experts: npt.NDArray[np.int16],
    num_experts: int,
    resampling: Resampling,
) -> Iterator[dict[str, Any]]:
    tests, weights, blocks = [], [], []
    for domain, (name, token_class) in enumerate(classes.items()):
        here = routing.domains == domain
        if not here.any() or token_class == "none":
            continue
        chosen, types = experts[here], types_RL[here]
        test = info.token_type_null(
            chosen.reshape(-1, chosen.shape[-1]),
            types.ravel(),
            len(TOKEN_TYPES[token_class]),
            num_experts,
            resampling.permutations,
            resampling.seed + domain,
        )
        counts = info.label_counts(chosen, types, NUM_TYPES, num_experts)
        tests.append(test)
        weights.append(float(types.size))
        blocks.append(counts)
        interval = _type_interval([counts], [1.0], resampling)
        yield {"label": f"{TYPE_LABEL}: {name}", **_row(test, interval, counts.sum(axis=0))}
    interval = _type_interval(blocks, weights, resampling)
    pooled = info.conditional(tests, weights)
    share = np.asarray(weights) / sum(weights)
    tables = [counts.sum(axis=0) for counts in blocks]
    row = _row(pooled, interval, tables[0])
    row["bits_corrected"] = float(share @ [info.miller_madow(table) for table in tables])
    uncertain = float(share @ [_label_entropy(table) for table in tables])
    row["share_of_label"] = pooled.observed / uncertain if uncertain else 0.0
    yield {"label": TYPE_LABEL, **row}


def _label_entropy(table: npt.NDArray[np.integer[Any]]) -> float:
    """Bits of the row labels: their information about themselves."""
    return float(info.mutual_information(np.diag(table.sum(axis=1))))


def _type_interval(
    blocks: list[Any], weights: list[float], resampling: Resampling
) -> tuple[float, float]:
    share = np.asarray(weights) / sum(weights)
    return info.bootstrap_interval(
        blocks,
        lambda tables: info.mutual_information(tables) @ share,
        resamples=resampling.bootstrap,
        seed=resampling.seed,
    )


def _row(
    test: info.NullTest, interval: tuple[float, float], table: npt.NDArray[np.integer[Any]]
) -> dict[str, float]:
    return {
        "bits": test.observed,
        "bits_low": interval[0],
        "bits_high": interval[1],
        "bits_corrected": float(info.miller_madow(table)),
        "share_of_label": float(info.share_of_label(table)),
        "permuted_mean": float(test.null.mean()),
        "permuted_95": float(np.quantile(test.null, 0.95)),
        "excess": test.excess,
        "p_permutation": test.p_value,
    }


def specialisation(
    records: Records, types_of: TypesOf, resampling: Resampling
) -> tuple[pd.DataFrame, list[str]]:
    """`routing_information` of every mixture run that ended, and what could not be read.

    Columns: variant, seed, router, num_experts, top_k, pool_size, steps, blocks, and those of the
    rows.
    """
    suite = records.suite
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    mixtures = [
        key
        for key in records.configs
        if records.setting(*key, "model.moe_layers") and records.status(*key) in ENDED
    ]
    with progress_bar("information of experts", len(mixtures)) as advance:
        for variant, seed in mixtures:
            path = suite.routing(variant, seed)
            num_experts = int(records.setting(variant, seed, "model.num_experts"))
            run = {
                "variant": variant,
                "seed": seed,
                "router": router_of(records, variant, seed),
                "num_experts": num_experts,
                "top_k": records.setting(variant, seed, "model.top_k"),
                "pool_size": records.setting(variant, seed, "model.pool_size") or 0,
                "steps": records.setting(variant, seed, "optim.max_steps"),
            }
            try:
                routing = read_routing(path) if path.exists() else None
            except ValueError as error:
                routing = None
                problems.append(str(error))
            if routing is None:
                if not path.exists():
                    problems.append(f"{variant} seed {seed}: no routing.npz")
            else:
                classes = token_classes_of(records.manifests[variant, seed])
                types = types_of(routing, seed, classes)
                blocks = {"blocks": len(routing.domains)}
                found = routing_information(routing, types, classes, num_experts, resampling)
                rows.extend({**run, **blocks, **row} for row in found)
            advance(1)
    return pd.DataFrame(rows), problems


def router_of(records: Records, variant: str, seed: int) -> str:
    """The router, with where it started if that was not at random: such a one is no null model."""
    router = str(records.setting(variant, seed, "model.router"))
    start = records.setting(variant, seed, "model.router_init") or "random"
    return router if start == "random" else f"{router} at {start}"


def against_nulls(table: pd.DataFrame, alpha: float = 0.05) -> pd.DataFrame:
    """Bits of every variant with a learned router less those of each null model, paired by seed.

    A null model counts for a variant only with as many experts, as many of them per token and in a
    document's pool, as many steps to train, and a mixture in the same layer. p-values are adjusted
    by Holm over all rows of the same label.
    """
    if table.empty:
        return pd.DataFrame()
    rows = []
    shape = ["num_experts", "top_k", "pool_size", "steps", "layer", "label"]
    learned = table[~table["router"].isin(NULL_ROUTERS)]
    nulls = table[table["router"].isin(NULL_ROUTERS)]
    for (variant, *key), runs in learned.groupby(["variant", *shape], sort=False):
        *_, layer, label = key
        alike = nulls[(nulls[shape] == key).all(axis=1)]
        for null, controls in alike.groupby("variant", sort=False):
            pairs = runs.merge(controls, on="seed", suffixes=("", "_null"))
            gain = (pairs["bits"] - pairs["bits_null"]).tolist()
            if gain:
                rows.append(
                    {
                        "variant": variant,
                        "null": null,
                        "layer": layer,
                        "label": label,
                        "bits": pairs["bits"].mean(),
                        "bits_null": pairs["bits_null"].mean(),
                        **asdict(paired_difference(gain)),
                        "seeds": " ".join(map(str, pairs["seed"])),
                    }
                )
    found = pd.DataFrame(rows)
    if found.empty:
        return found
    found = found.drop(columns="p_equivalence")
    found["p_holm"] = found.groupby("label")["p"].transform(holm)
    found["verdict"] = [
        _verdict(row.mean, row.n, row.p_holm, alpha) for row in found.itertuples(index=False)
    ]
    return found


def _verdict(mean: float, n: int, p: float, alpha: float) -> str:
    if n < MIN_SEEDS:
        return "too few seeds"
    if p >= alpha:
        return "undecided"
    return "more than the null" if mean > 0 else "less than the null"

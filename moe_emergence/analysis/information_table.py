"""What an expert tells of a token: bits per layer and label beside their nulls."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moe_emergence.analysis import information as info
from moe_emergence.analysis.counts import LayerCounts
from moe_emergence.analysis.routing_tables import token_id_table
from moe_emergence.analysis.token_types import TOKEN_TYPES


@dataclass(frozen=True)
class Resampling:
    """How often to permute and to resample, and from which seed."""

    permutations: int = 199
    bootstrap: int = 200
    seed: int = 0


def information_table(layers: Sequence[LayerCounts], resampling: Resampling) -> pd.DataFrame:
    """A row per layer and label: "domain", "token type" (mean of the domains), "token type: D",
    "token id".

    `bits` is the plug-in mutual information and `bits_corrected` that less its first-order bias;
    `bits_low` and `bits_high` a 95% bootstrap interval over groups of blocks; `share_of_label`
    bits over the label's entropy; `permuted_mean`, `permuted_95`, `p_permutation` of the
    permutation test: domains of whole groups, or types among the tokens of a domain.
    `uniform_bits` is 0, what uniform routing tells; `null_router_bits` and `null_router_95` mean
    and 95th percentile of random routers that read the same hidden states (of token ids unknown),
    and `p_router` the share of them that tell as much, adjusted over the layers. Domains count all
    slots, the other labels first experts.
    """
    rows: list[dict[str, Any]] = []
    for counts in layers:
        rows.append({"layer": counts.layer, "label": "domain"} | _domain_row(counts, resampling))
        rows += [{"layer": counts.layer} | row for row in _type_rows(counts, resampling)]
        table = token_id_table(counts)
        rows.append({"layer": counts.layer, "label": "token id"} | _row(table, None, None))
    _compare_with_routers(rows)
    return pd.DataFrame(rows).assign(uniform_bits=0.0)


def _compare_with_routers(rows: list[dict[str, Any]]) -> None:
    """Put what random routers tell, in `null_routers` (N,), into columns of each row."""
    for label in {row["label"] for row in rows}:
        of_label = [row for row in rows if row["label"] == label and "null_routers" in row]
        if not of_label:
            continue
        nulls_LN = np.stack([row.pop("null_routers") for row in of_label])
        p_L = info.largest_of_layers(np.array([row["bits"] for row in of_label]), nulls_LN)
        for row, null_N, p in zip(of_label, nulls_LN, p_L, strict=True):
            row["null_router_bits"] = float(null_N.mean())
            row["null_router_95"] = float(np.quantile(null_N, 0.95))
            row["p_router"] = float(p)


def _domain_row(counts: LayerCounts, resampling: Resampling) -> dict[str, Any]:
    filled = [part[part.any(axis=1)] for part in counts.grouped]
    present = [part for part in filled if len(part)]
    labels = np.repeat(np.arange(len(filled)), [len(part) for part in filled])
    stacked = np.concatenate(filled)
    domains = len(counts.classes)
    test = info.domain_null(stacked, labels, domains, resampling.permutations, resampling.seed)
    interval = info.bootstrap_interval(
        present, info.mutual_information, resamples=resampling.bootstrap, seed=resampling.seed
    )
    row = _row(info.domain_table(stacked, labels, domains), test, interval)
    return row | {"null_routers": info.mutual_information(counts.null_grouped)}


def _type_rows(counts: LayerCounts, resampling: Resampling) -> list[dict[str, Any]]:
    rows, tests, weights, groups = [], [], [], []
    for place, (domain, token_class) in enumerate(counts.classes.items()):
        grouped = counts.types_grouped[place][:, : len(TOKEN_TYPES[token_class])].astype(np.int64)
        grouped = grouped[grouped.any(axis=(1, 2))]
        if not len(grouped):
            continue
        table = grouped.sum(axis=0)
        test = type_null(table, resampling.permutations, resampling.seed + place)
        interval = info.bootstrap_interval(
            [grouped], lambda tables: info.mutual_information(tables)[..., 0],
            resamples=resampling.bootstrap, seed=resampling.seed,
        )  # fmt: skip
        row = _row(table, test, interval)
        row["null_routers"] = info.mutual_information(counts.null_types[:, place])
        rows.append({"label": f"token type: {domain}"} | row)
        tests.append(test)
        weights.append(float(table.sum()))
        groups.append(counts.types_grouped[place][counts.types_grouped[place].any(axis=(1, 2))])
    if not tests:
        return []
    share = np.asarray(weights) / sum(weights)
    pooled = info.conditional(tests, weights)
    interval = info.bootstrap_interval(
        groups, lambda tables: info.mutual_information(tables) @ share,
        resamples=resampling.bootstrap, seed=resampling.seed,
    )  # fmt: skip
    mean = {
        "bits": pooled.observed,
        "bits_corrected": float(share @ [row["bits_corrected"] for row in rows]),
        "bits_low": interval[0],
        "bits_high": interval[1],
        "share_of_label": float(share @ [row["share_of_label"] for row in rows]),
        "null_routers": share @ np.stack([row["null_routers"] for row in rows]),
        **_null_columns(pooled),
    }
    return [{"label": "token type"} | mean, *rows]


def type_null(table: info.Ints, permutations: int, seed: int) -> info.NullTest:
    """I(type; first expert) of the table (Y, E) against types permuted among the tokens."""
    tables = info.permuted_tables(table[table.any(axis=1)], permutations, seed)
    null = np.concatenate([info.mutual_information(drawn) for drawn in tables])
    return info.NullTest(float(info.mutual_information(table)), null)


def _row(
    table: info.Ints, test: info.NullTest | None, interval: tuple[float, float] | None
) -> dict[str, Any]:
    low, high = interval or (np.nan, np.nan)
    return {
        "bits": float(info.mutual_information(table)),
        "bits_corrected": float(info.miller_madow(table)),
        "bits_low": low,
        "bits_high": high,
        "share_of_label": float(info.share_of_label(table)),
        **(_null_columns(test) if test else {}),
    }


def _null_columns(test: info.NullTest) -> dict[str, float]:
    return {
        "permuted_mean": float(test.null.mean()),
        "permuted_95": float(np.quantile(test.null, 0.95)),
        "p_permutation": test.p_value,
    }

"""The heatmaps of the page: by metric, run, layer and panel, each a matrix with its names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moe_emergence.analysis.routing_tables import ALL_SLOTS


@dataclass(frozen=True)
class Metric:
    """A heatmap: the table its numbers are in, and how they lie in it."""

    title: str
    table: str
    rows: str
    columns: str
    value: str
    unit: str
    about: str
    """What it shows, for someone who sees it for the first time."""
    scale: str = "quantity"
    """"quantity" from 0, "signed" around 0, "range" from the least to the most there is."""
    panel: str | None = None
    """Column whose values are shown one at a time, as layers are."""


METRICS = {
    "expert_domain": Metric(
        "Expert × domain", "expert_domain", "domain", "expert", "fraction",
        "share of the domain's assignments",
        "Where each domain's tokens go: a row adds up to 1.",
    ),
    "expert_token_type": Metric(
        "Expert × token type", "expert_token_type", "type", "expert", "fraction",
        "share of the type's assignments",
        "Where each kind of token goes, by domain: a row adds up to 1.",
    ),
    "coactivation": Metric(
        "Co-activation", "coactivation", "expert", "other_expert", "excess",
        "share of the expert's tokens, less what loads give",
        "Which experts see the same token more (or less) often than their loads explain.",
        "signed", "other_layer",
    ),
    "knockout": Metric(
        "Knock-out", "knockout", "domain", "expert", "increase",
        "increase of lm_loss (nats per token)",
        "How much worse the model predicts each domain when one expert is taken away.", "signed",
    ),
    "modules": Metric(
        "Modules", "module_damage", "domain", "on", "damage",
        "increase of lm_loss (nats per token)",
        "What each domain (column) loses without the experts named as a domain's (row).",
        "signed", "corpus",
    ),
    "retention": Metric(
        "Retention", "retention", "best_for", "on", "increase",
        "increase of lm_loss (nats per token)",
        "What each domain (column) loses when only the experts best for one (row) are kept.",
        "signed", "kept",
    ),
    "similarity": Metric(
        "Similarity", "similarity", "expert", "other_expert", "cosine", "cosine",
        "How alike two experts are: in their weights, in what training moved, in what they put "
        "out. An expert with itself (always 1) is left out, and colours run from the least to the "
        "most there is.",
        "range", "kind",
    ),
}  # fmt: skip


NAMES = {"on": "loss on", "best_for": "kept best for", "other_expert": "other expert"}
"""Of columns, where they are shown."""


def heatmap_data(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Per metric its texts and, per run, layer and panel, the matrix with its names."""
    found: dict[str, Any] = {}
    for name, metric in METRICS.items():
        if metric.table in tables:
            found[name] = {
                "title": metric.title, "unit": metric.unit, "about": metric.about,
                "scale": metric.scale, "table": metric.table,
                "rowTitle": NAMES.get(metric.rows, metric.rows),
                "columnTitle": NAMES.get(metric.columns, metric.columns),
                "views": _views(metric, _prepared(metric, tables[metric.table])),
            }  # fmt: skip
    return found


def _views(metric: Metric, table: pd.DataFrame) -> list[dict[str, Any]]:
    keys = ["run", "layer", *([metric.panel] if metric.panel else [])]
    views = []
    for key, part in table.groupby(keys, sort=False, dropna=False):
        matrix = part.pivot_table(metric.value, metric.rows, metric.columns, sort=False)
        if metric.columns != "on":
            matrix = matrix.sort_index(axis=1)
        panel = f"{metric.panel.replace('_', ' ')}: {key[2]}" if metric.panel else ""
        views.append(
            {
                "run": str(key[0]), "layer": None if pd.isna(key[1]) else int(key[1]),
                "panel": panel,
                "rows": [str(row) for row in matrix.index],
                "columns": [str(column) for column in matrix.columns],
                "z": _rounded(matrix.to_numpy(), own=metric.scale != "range"),
            }
        )  # fmt: skip
    return views


def _prepared(metric: Metric, table: pd.DataFrame) -> pd.DataFrame:
    if "slot" in table:
        table = table[table["slot"] == ALL_SLOTS]
    if metric.rows == "type":
        table = table.assign(type=table["domain"] + ": " + table["token_type"])
    if metric.value == "excess":
        table = table.assign(excess=table["conditional"] - table["expected"])
    return table if "layer" in table else table.assign(layer=None)


def _rounded(values: np.ndarray[Any, Any], *, own: bool) -> list[list[float | None]]:
    """JSON's numbers; without `own`, none on the diagonal."""
    return [
        [
            None if np.isnan(v) or (r == c and not own) else round(float(v), 4)
            for c, v in enumerate(row)
        ]
        for r, row in enumerate(values)
    ]

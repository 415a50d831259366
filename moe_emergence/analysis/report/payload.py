"""The numbers of the page: heatmaps by metric, run and layer, lines over training, the explorer."""

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_emergence.analysis.routing_tables import ALL_SLOTS

# Okabe and Ito's palette; its yellow is too pale for lines
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")


@dataclass(frozen=True)
class Metric:
    """A heatmap: the table its numbers are in, and how they lie in it."""

    title: str
    table: str
    rows: str
    columns: str
    value: str
    unit: str
    signed: bool = False
    panel: str | None = None
    """Column whose values are shown side by side, as further layers would be."""


METRICS = {
    "expert_domain": Metric(
        "Expert × domain", "expert_domain", "domain", "expert", "fraction",
        "share of the domain's assignments",
    ),
    "expert_token_type": Metric(
        "Expert × token type", "expert_token_type", "type", "expert", "fraction",
        "share of the type's assignments",
    ),
    "coactivation": Metric(
        "Co-activation", "coactivation", "expert", "other_expert", "excess",
        "share of the expert's tokens, less what loads give", True, "other_layer",
    ),
    "knockout": Metric(
        "Knock-out", "knockout", "domain", "expert", "increase",
        "increase of lm_loss (nats per token)", True,
    ),
    "similarity": Metric(
        "Similarity", "similarity", "expert", "other_expert", "cosine", "cosine", True, "kind"
    ),
}  # fmt: skip


def heatmap_data(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Per metric its texts and, per run, layer and panel, the matrix with its names."""
    found: dict[str, Any] = {}
    for name, metric in METRICS.items():
        if metric.table not in tables:
            continue
        table = _prepared(metric, tables[metric.table])
        keys = ["run", "layer", *([metric.panel] if metric.panel else [])]
        views = []
        for key, part in table.groupby(keys, sort=False):
            matrix = part.pivot_table(metric.value, metric.rows, metric.columns, sort=False)
            matrix = matrix.sort_index(axis=1)
            views.append(
                {
                    "run": str(key[0]), "layer": int(key[1]),
                    "panel": f"{metric.panel.replace('_', ' ')}: {key[2]}" if metric.panel else "",
                    "rows": [str(row) for row in matrix.index],
                    "columns": [str(column) for column in matrix.columns],
                    "z": _rounded(matrix.to_numpy()),
                }
            )  # fmt: skip
        found[name] = {
            "title": metric.title, "unit": metric.unit, "signed": metric.signed,
            "rowTitle": metric.rows.replace("_", " "),
            "columnTitle": metric.columns.replace("_", " "),
            "table": metric.table, "views": views, "figure": _heatmap_figure(metric),
        }  # fmt: skip
    return found


def _prepared(metric: Metric, table: pd.DataFrame) -> pd.DataFrame:
    if "slot" in table:
        table = table[table["slot"] == ALL_SLOTS]
    if metric.rows == "type":
        table = table.assign(type=table["domain"] + ": " + table["token_type"])
    if metric.value == "excess":
        table = table.assign(excess=table["conditional"] - table["expected"])
    return table


def _heatmap_figure(metric: Metric) -> dict[str, Any]:
    figure = go.Figure(
        go.Heatmap(
            colorscale="PuOr_r" if metric.signed else "Cividis",
            zmid=0 if metric.signed else None,
            colorbar={"title": {"text": metric.unit, "side": "right"}, "thickness": 14},
            hovertemplate=f"{metric.rows} %{{y}}<br>{metric.columns.replace('_', ' ')} %{{x}}"
            f"<br>%{{z:.4f}} {metric.unit}<extra></extra>",
        )
    )
    figure.update_layout(
        margin={"l": 10, "r": 10, "t": 10, "b": 52},
        xaxis={
            "title": {"text": metric.columns.replace("_", " "), "standoff": 6},
            "type": "category",
            "automargin": True,
        },
        yaxis={"autorange": "reversed", "type": "category", "automargin": True},
        template="none",
    )
    return dict(figure.to_plotly_json())


@dataclass(frozen=True)
class Curve:
    """Lines over training: the table, and what makes a line."""

    title: str
    table: str
    value: str
    unit: str
    series: tuple[str, ...]
    only: tuple[str, str] | None = None
    """Column and the beginning of its values."""


CURVES = {
    "loss": Curve(
        "Evaluation loss", "training", "value", "lm_loss (nats per token)", ("run", "metric"),
        ("metric", "eval/lm_loss"),
    ),
    "largest": Curve(
        "Largest share", "collapse", "largest_share", "largest expert's share", ("run", "layer")
    ),
    "entropy": Curve(
        "Router entropy", "entropy_over_training", "entropy", "entropy of a token (nats)",
        ("run", "layer"),
    ),
    "load": Curve(
        "Load of every expert", "load_over_training", "fraction", "share of the assignments",
        ("run", "layer", "expert"),
    ),
    "saturation": Curve(
        "Router saturation", "saturation", "share", "share of final assignments", ("run", "layer")
    ),
    "agreement": Curve(
        "Agreement of the router's gradients", "router_gradients", "agreement_lm",
        "cosine between two halves of a text", ("run", "layer"),
    ),
}  # fmt: skip


def curve_data(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Per curve its title, unit, table and a Plotly figure of its lines."""
    found = {}
    for name, curve in CURVES.items():
        table = tables.get(curve.table)
        if table is None:
            continue
        if curve.only:
            column, start = curve.only
            table = table[table[column].str.startswith(start)]
        figure = go.Figure()
        groups = list(table.groupby(list(curve.series), sort=False))
        for place, (key, part) in enumerate(groups):
            part = part.sort_values("step")
            raw = _line_name(curve, key, table)  # Plotly reads its labels as a little HTML
            figure.add_scatter(
                x=part["step"].tolist(), y=[round(v, 5) for v in part[curve.value].tolist()],
                name=html.escape(raw), meta=raw, mode="lines",
                line={
                    "color": LINE_COLOURS[place % len(LINE_COLOURS)],
                    "dash": ("solid", "dash", "dot", "dashdot")[place // len(LINE_COLOURS) % 4],
                },
            )  # fmt: skip
        figure.update_layout(
            template="none", margin={"l": 60, "r": 10, "t": 10, "b": 52}, hovermode="closest",
            xaxis={"title": {"text": "training step", "standoff": 6}, "automargin": True},
            yaxis={"title": {"text": curve.unit}}, showlegend=True,
        )  # fmt: skip
        if groups:
            found[name] = {
                "title": curve.title, "unit": curve.unit, "table": curve.table,
                "figure": dict(figure.to_plotly_json()),
            }  # fmt: skip
    return found


def _line_name(curve: Curve, key: tuple[Any, ...], table: pd.DataFrame) -> str:
    parts = []
    for column, value in zip(curve.series, key, strict=True):
        if column == "run":
            parts += [str(value)] if table["run"].nunique() > 1 else []
        elif column == "metric":
            parts.append(str(value).removeprefix("eval/lm_loss").strip("_") or "all")
        else:
            parts.append(f"{column} {value}")
    return ", ".join(parts)


def vocabulary_data(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Per "run|layer|expert" the expert's top tokens with counts and shares."""
    table = tables.get("vocabulary")
    if table is None:
        return {}
    return {
        f"{run}|{layer}|{expert}": [
            [str(row["token"]), int(row["tokens"]), round(float(row["share"]), 3)]
            for row in part.sort_values("rank").to_dict("records")
        ]
        for (run, layer, expert), part in table.groupby(["run", "layer", "expert"])
    }


def _rounded(values: np.ndarray[Any, Any]) -> list[list[float | None]]:
    return [[None if np.isnan(v) else round(float(v), 4) for v in row] for row in values]

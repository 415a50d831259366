"""The lines of the page: what a run logged, and what its checkpoints say of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Curve:
    """Lines over training: the table, what makes a line, and what a view of them."""

    title: str
    table: str
    value: str
    unit: str
    about: str
    series: tuple[str, ...]
    views: tuple[str, ...] = ()
    """Columns whose values are shown one at a time."""
    only: tuple[str, str] | None = None
    """Column, and a pattern of which its values are; what the pattern's group holds names them."""


CURVES = {
    "loss": Curve(
        "Evaluation loss", "training", "value", "lm_loss (nats per token)",
        "How well the model predicts the next token: less is better.", ("run", "metric"),
        only=("metric", r"eval/lm_loss_?(.*)"),
    ),
    "churn": Curve(
        "Churn", "training", "value", "share of a fixed text's tokens",
        "How many tokens have another expert than at the evaluation before. Experts that keep "
        "seeing other tokens have nothing to specialise in.", ("run", "metric"),
        only=("metric", r"eval/(layer_\d+)_churn"),
    ),
    "saturation": Curve(
        "Router saturation", "saturation", "share", "share of final assignments",
        "How many of the last checkpoint's assignments a checkpoint had already.",
        ("run", "layer"),
    ),
    "trajectory": Curve(
        "Trajectories of the experts", "trajectory", "fraction", "share of the domain's tokens",
        "Which experts a domain's tokens went to, checkpoint by checkpoint.", ("run", "expert"),
        ("layer", "domain"),
    ),
    "load": Curve(
        "Load of every expert", "load_over_training", "fraction", "share of the assignments",
        "How many of a step's tokens each expert got.", ("run", "expert"), ("layer",),
    ),
    "largest": Curve(
        "Largest share", "collapse", "largest_share", "largest expert's share",
        "What the busiest expert got: towards 1, the others have collapsed.", ("run", "layer"),
    ),
    "entropy": Curve(
        "Router entropy", "entropy_over_training", "entropy", "entropy of a token (nats)",
        "How undecided the router is about a token: 0 is certain.", ("run", "layer"),
    ),
    "agreement": Curve(
        "Agreement of the router's gradients", "router_gradients", "agreement_lm",
        "cosine between two halves of a text",
        "Whether two halves of a text ask the same change of a router: 1 the same, 0 unrelated.",
        ("run", "layer"),
    ),
}  # fmt: skip


def curve_data(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Per curve its texts, table and views of lines (name, run, label, expert, x in steps, y)."""
    found = {}
    for name, curve in CURVES.items():
        table = tables.get(curve.table)
        if table is None:
            continue
        if curve.only:
            column, pattern = curve.only
            part = table[column].str.extract(f"^{pattern}$")[0]
            table = table.assign(**{column: part.replace("", "all")})[part.notna()]
        views = _views(curve, table)
        if views:
            found[name] = {
                "title": curve.title, "unit": curve.unit, "about": curve.about,
                "table": curve.table, "views": views,
            }  # fmt: skip
    return found


def _views(curve: Curve, table: pd.DataFrame) -> list[dict[str, Any]]:
    if not curve.views:
        return [{"name": "", "lines": _lines(curve, table)}] if len(table) else []
    return [
        {"name": ", ".join(_words(curve.views, key)), "lines": _lines(curve, part)}
        for key, part in table.groupby(list(curve.views), sort=False)
    ]


def _lines(curve: Curve, table: pd.DataFrame) -> list[dict[str, Any]]:
    several = table["run"].nunique() > 1
    lines = []
    for key, part in table.groupby(list(curve.series), sort=False):
        part = part.sort_values("step")
        named = dict(zip(curve.series, key, strict=True))
        run, *rest = _words(curve.series, key)
        label = ", ".join(rest)
        lines.append(
            {
                "name": f"{run}, {label}" if several else label, "label": label,
                "x": part["step"].tolist(),
                "y": [round(value, 5) for value in part[curve.value].tolist()],
                "expert": named.get("expert"), "run": run,
            }
        )  # fmt: skip
    return sorted(lines, key=lambda line: line["label"] == "all")


def _words(columns: tuple[str, ...], values: tuple[Any, ...]) -> list[str]:
    plain = ("run", "domain", "metric")
    return [
        str(value).replace("layer_", "layer ") if column in plain else f"{column} {value}"
        for column, value in zip(columns, values, strict=True)
    ]

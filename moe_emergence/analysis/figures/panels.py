"""Building blocks of the figures: a heatmap or lines per run and layer, whatever their number."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any common colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
LINES = ("-", "--", "-.", ":")
QUANTITY = "cividis"
SIGNED = "PuOr_r"
MOST_WRITTEN = 16
COLUMNS = 4


def style(place: int) -> dict[str, Any]:
    """Colour and line of the n-th series; the first 32 differ."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": LINES[place // len(COLOURS) % len(LINES)],
    }


def grid(count: int, width: float, height: float, most: int = COLUMNS) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes of this size in inches, at most `most` in a row."""
    columns = max(1, min(most, count))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(width * columns + 1.2, height * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, list(axes[:count])


def heatmaps(
    table: pd.DataFrame, *, rows: str, columns: str, value: str, label: str, title: str,
    panels: Sequence[str] = ("run", "layer"), signed: bool = False,
    from_least: bool = False, scale: float = 1.0, form: str = "{:.0f}", across: int = COLUMNS,
) -> Figure:  # fmt: skip
    """A heatmap for every combination of `panels`, all with one colour scale.

    It begins at 0, at the least value with `from_least`, and is even around 0 with `signed`.

    Values are written into the cells where there are at most `MOST_WRITTEN` columns.
    """
    groups = list(table.groupby(list(panels), sort=False))
    tables = [
        (key, scale * group.pivot_table(value, rows, columns, sort=False, dropna=False))
        for key, group in groups
    ]
    tables = [(key, part.sort_index(axis=1)) for key, part in tables]
    height = max(len(part) for _, part in tables)
    width = max(part.shape[1] for _, part in tables)
    size = min(9, max(3, 1.6 + 0.36 * width)), min(8, max(1.3, 0.8 + 0.26 * height))
    figure, axes = grid(len(tables), *size, across)
    values = np.concatenate([part.to_numpy().ravel() for _, part in tables])
    top = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    low = -top if signed else 0.0
    if from_least and np.isfinite(values).any():
        low, top = float(np.nanmin(values)), float(np.nanmax(values))
    norm = Normalize(low, top if top > low else low + 1.0)
    colours = ScalarMappable(norm, SIGNED if signed else QUANTITY)
    for axis, (key, part) in zip(axes, tables, strict=True):
        axis.imshow(part.to_numpy(), cmap=colours.cmap, norm=norm, aspect="auto")
        axis.set_title(panel_name(panels, key, table), fontsize=9, loc="left")
        ticks = range(0, part.shape[1], max(1, part.shape[1] // 16))
        axis.set_xticks(list(ticks), [str(part.columns[t]) for t in ticks], fontsize=7)
        ticks = range(0, len(part), max(1, len(part) // 24))
        axis.set_yticks(list(ticks), [str(part.index[t]) for t in ticks], fontsize=7)
        axis.set_xlabel(columns.replace("_", " "), fontsize=8)
        if not isinstance(part.index[0], str):
            axis.set_ylabel(rows, fontsize=8)
        if part.shape[1] <= MOST_WRITTEN and len(part) <= 24:
            for (r, c), cell in np.ndenumerate(part.to_numpy()):
                if np.isfinite(cell):
                    dark = abs(cell) > 0.6 * top if signed else norm(cell) < 0.5
                    axis.text(
                        c, r, written(cell, form), ha="center", va="center", fontsize=6,
                        color="white" if dark else "black", in_layout=False,
                    )  # fmt: skip
    bar = figure.colorbar(colours, ax=axes)
    bar.set_label(textwrap.fill(label, max(20, int(9 * figure.get_figheight()))), fontsize=8)
    return titled(figure, title)


def lines(
    table: pd.DataFrame, *, x: str, y: str, series: str, label: str, title: str,
    panels: Sequence[str] = ("run", "layer"), x_label: str | None = None,
) -> Figure:  # fmt: skip
    """A line for every `series`, a panel for every combination of `panels`."""
    groups = list(table.groupby(list(panels), sort=False))
    figure, axes = grid(len(groups), 3.2, 2.4)
    names = list(dict.fromkeys(table[series]))
    for axis, (key, group) in zip(axes, groups, strict=True):
        for place, name in enumerate(names):
            part = group[group[series] == name].sort_values(x)
            if len(part):
                axis.plot(
                    part[x], part[y], label=str(name), linewidth=1.2,
                    marker="." if len(part) < 12 else None, **style(place),
                )  # fmt: skip
        axis.set_title(panel_name(panels, key, table), fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
        axis.locator_params(axis="x", nbins=5)
    if 1 < len(names) <= 32:
        axes[min(len(axes), COLUMNS) - 1].legend(
            title=series, fontsize=7, title_fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1),
            frameon=False,
        )  # fmt: skip
    figure.supxlabel(x_label or x, fontsize=9)
    figure.supylabel(label, fontsize=9)
    return titled(figure, title)


def bars(
    table: pd.DataFrame, *, values: dict[str, str], label: str, title: str, x: str = "layer",
    low: str | None = None, high: str | None = None,
) -> Figure:  # fmt: skip
    """Groups of bars by `x`, a panel per run; `values` are columns and their names."""
    groups = list(table.groupby("run", sort=False))
    figure, axes = grid(len(groups), max(3.4, 0.5 * len(table[x].unique())), 2.8)
    for axis, (run, group) in zip(axes, groups, strict=True):
        spots = np.arange(len(group))
        width = 0.8 / len(values)
        for place, (column, name) in enumerate(values.items()):
            at = spots + (place - (len(values) - 1) / 2) * width
            axis.bar(at, group[column], width, label=name, color=COLOURS[place % len(COLOURS)])
            if place == 0 and low and high:
                center = group[column].to_numpy()
                reach = [center - group[low], group[high] - center]
                axis.errorbar(at, center, np.maximum(reach, 0), fmt="none", ecolor="black")
        axis.set_xticks(spots, [str(v) for v in group[x]], fontsize=7)
        axis.set_title(str(run), fontsize=9, loc="left")
        axis.set_xlabel(x)
    axes[min(len(axes), COLUMNS) - 1].legend(
        fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False
    )
    figure.supylabel(label, fontsize=9)
    return titled(figure, title)


def written(value: float, form: str) -> str:
    """The value in a cell; no minus in front of a zero."""
    text = form.format(value)
    return text.lstrip("-") if float(text) == 0 else text


def titled(figure: Figure, title: str) -> Figure:
    """The figure with a title broken to its width."""
    figure.suptitle(textwrap.fill(title, int(10 * figure.get_figwidth())), fontsize=11)
    return figure


def panel_name(panels: Sequence[str], key: Any, table: pd.DataFrame) -> str:
    """`layer 2`, with the run's name in front where there are several runs."""
    parts = []
    for column, value in zip(panels, key if isinstance(key, tuple) else (key,), strict=True):
        if column == "run":
            parts += [str(value)] if table["run"].nunique() > 1 else []
        else:
            parts.append(f"{column.replace('_', ' ')} {value}" if column == "layer" else str(value))
    return ", ".join(parts)

"""Which experts of two models share their tokens, each beside the one that it is matched with."""

import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from moe_emergence.analysis.figures.panels import MOST_WRITTEN, QUANTITY, grid, titled


def plot_overlap(table: pd.DataFrame, name: str, other: str) -> Figure:
    """A matrix for every layer; the columns stand in the order of the match, the rest behind."""
    groups = list(table.groupby("layer"))
    rows, columns = table["expert"].nunique(), table["other_expert"].nunique()
    figure, axes = grid(
        len(groups), min(7, 1.8 + 0.34 * columns), min(6, max(1.5, 0.9 + 0.3 * rows))
    )
    scale = Normalize(0, 100)
    for axis, (layer, part) in zip(axes, groups, strict=True):
        matrix = 100 * part.pivot_table("share", "expert", "other_expert")
        matched = part[part["matched"]].sort_values("expert")["other_expert"].tolist()
        matrix = matrix[matched + [column for column in matrix if column not in matched]]
        axis.imshow(matrix.to_numpy(), cmap=QUANTITY, norm=scale, aspect="auto")
        axis.set_title(f"layer {layer}", fontsize=9, loc="left")
        step = max(1, matrix.shape[1] // 16)
        axis.set_xticks(range(0, matrix.shape[1], step), matrix.columns[::step], fontsize=7)
        step = max(1, len(matrix) // 16)
        axis.set_yticks(range(0, len(matrix), step), matrix.index[::step], fontsize=7)
        axis.set_xlabel(f"expert of {other}", fontsize=8)
        axis.set_ylabel(f"expert of {name}", fontsize=8)
        if max(matrix.shape) <= MOST_WRITTEN:
            for row in range(len(matrix)):
                for column in range(matrix.shape[1]):
                    cell = matrix.iat[row, column]
                    axis.text(
                        column, row, f"{cell:.0f}", ha="center", va="center", fontsize=6,
                        color="white" if cell < 50 else "black",
                    )  # fmt: skip
    colours = ScalarMappable(scale, QUANTITY)
    figure.colorbar(colours, ax=axes).set_label("share of the expert's tokens (%)", fontsize=8)
    return titled(figure, "Which experts read the same tokens, matched")

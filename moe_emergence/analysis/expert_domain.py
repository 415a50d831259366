"""Who routes where: each domain's assignments over the experts of every layer.

Letters: D domains, E experts.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from moe_emergence.analysis.information import mutual_information
from moe_emergence.domain_fractions import DomainFractions

COLOURS = "cividis"


def plot_expert_domain(runs: Mapping[str, DomainFractions]) -> Figure:
    """Heatmaps, a row per layer and a column per run: share (%) of each domain's assignments.

    Args:
        runs: by title, the same layers and domains in all.
    """
    layers = list(next(iter(runs.values())))
    first = next(iter(runs.values()))[layers[0]]
    num_experts = len(next(iter(first.values())))
    width = max(5.0, 0.7 * num_experts + 2.5)
    figure = Figure(
        figsize=(1.0 + (width - 1.0) * len(runs), (1.0 + 0.3 * len(first)) * len(layers) + 0.8),
        layout="constrained",
    )
    axes = figure.subplots(len(layers), len(runs), squeeze=False, sharex=True, sharey=True)
    # one scale for all, so that colours can be compared
    top = max(max(map(max, of.values())) for layers in runs.values() for of in layers.values())
    scale = Normalize(0, 100 * top)
    for column, (title, fractions) in enumerate(runs.items()):
        for axis, (layer, by_domain) in zip(axes[:, column], fractions.items(), strict=True):
            rows = list(by_domain.values())
            bits = float(mutual_information(rows))
            place = f"{title}, layer {layer}" if len(runs) > 1 else f"layer {layer}"
            axis.set_title(f"{place} ({bits:.2f} bits of the domain)", fontsize=10, loc="left")
            _draw(axis, list(by_domain), 100 * np.asarray(rows), scale)
    figure.supxlabel(f"expert (uniform routing: {100 / num_experts:.1f}% each)", fontsize=10)
    colours = ScalarMappable(scale, COLOURS)
    figure.colorbar(colours, ax=list(axes.flat), label="share of the domain's tokens (%)")
    figure.suptitle("Where each domain's tokens go", fontsize=11)
    return figure


def _draw(
    axis: Axes, domains: list[str], shares: npt.NDArray[np.float64], scale: Normalize
) -> None:
    axis.imshow(shares, cmap=COLOURS, norm=scale, aspect="auto")
    axis.set_yticks(range(len(domains)), domains)
    axis.set_xticks(range(shares.shape[1]))
    if shares.shape[1] <= 16:
        for (d, e), share in np.ndenumerate(shares):
            dark = scale(share) < 0.5
            axis.text(
                e, d, f"{share:.0f}", ha="center", va="center", fontsize=8,
                color="white" if dark else "black",
            )  # fmt: skip

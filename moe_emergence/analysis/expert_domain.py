"""Who routes where: each domain's assignments over the experts of every layer.

Letters: D domains, E experts.
"""

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from moe_emergence.config import DOMAINS
from moe_emergence.domain_fractions import DomainFractions


def plot_expert_domain(fractions: DomainFractions) -> Figure:
    """One heatmap per layer: share (%) of each domain's (D) assignments that each expert (E) gets.

    Args:
        fractions: per layer, D rows of E shares that sum to 1.
    """
    num_experts = len(next(iter(fractions.values()))[0])
    figure = Figure(
        figsize=(max(5.0, 0.7 * num_experts + 2.5), 1.9 * len(fractions) + 0.8),
        layout="constrained",
    )
    axes = figure.subplots(len(fractions), 1, squeeze=False, sharex=True)[:, 0]
    # one scale for all layers, so that colours can be compared between them
    top = max(max(max(row) for row in rows) for rows in fractions.values())
    colours = ScalarMappable(Normalize(0, 100 * top), "cividis")
    for axis, (layer, rows) in zip(axes, fractions.items(), strict=True):
        shares = 100 * np.asarray(rows)
        axis.imshow(shares, cmap=colours.cmap, norm=colours.norm, aspect="auto")
        axis.set_title(f"layer {layer}", fontsize=10, loc="left")
        axis.set_yticks(range(len(DOMAINS)), DOMAINS)
        axis.set_xticks(range(num_experts))
        if num_experts <= 16:
            for (d, e), share in np.ndenumerate(shares):
                dark = share < 50 * top
                axis.text(
                    e, d, f"{share:.0f}", ha="center", va="center", fontsize=8,
                    color="white" if dark else "black",
                )  # fmt: skip
    axes[-1].set_xlabel(f"expert (uniform routing: {100 / num_experts:.1f}% each)")
    figure.colorbar(colours, ax=list(axes), label="share of the domain's tokens (%)")
    figure.suptitle("Where each domain's tokens go", fontsize=11)
    return figure

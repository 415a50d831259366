"""The figures of a report, from the tables that stand beside them as CSV."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moe_emergence.analysis.figures.panels import COLOURS, LINES, style
from moe_emergence.experiments.collapse_study import CollapseStudy
from moe_emergence.experiments.description import Comparison
from moe_emergence.experiments.lengths import BITS, LOSS
from moe_emergence.experiments.specialisation import DOMAIN_LABEL, NULL_ROUTERS, TYPE_LABEL

MARKERS = ("", "o", "s", "^")
GREY = "#888888"
VERDICT_COLOURS = {"better": "#0072B2", "worse": "#D55E00", "equivalent": "#009E73"}


def plot_comparisons(table: pd.DataFrame, margin: float) -> Figure:
    """Differences in final lm_loss with 95% intervals, a panel per domain, dots for the seeds."""
    pairs = list(dict.fromkeys(zip(table["variant"], table["control"], strict=True)))
    panels = list(dict.fromkeys(table["domain"]))
    figure = Figure(
        figsize=(3.8 + 1.8 * len(panels), 0.45 * len(pairs) + 1.9), layout="constrained"
    )
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, domain in zip(axes, panels, strict=True):
        axis.axvspan(-margin, margin, color="#DDDDDD", zorder=0)
        axis.axvline(0, color=GREY, linewidth=0.8)
        rows = table[table["domain"] == domain].set_index(["variant", "control"])
        for height, pair in enumerate(pairs):
            row = rows.loc[pair]
            if not row["n"]:
                continue
            colour = VERDICT_COLOURS.get(row["verdict"], GREY)
            seeds = [float(value) for value in row["differences"].split()]
            axis.plot(seeds, [height + 0.2] * len(seeds), ".", color=colour, alpha=0.6, ms=5)
            axis.plot([row["low"], row["high"]], [height, height], color=colour, linewidth=2)
            axis.plot(row["mean"], height, "o", color=colour, ms=6)
        axis.set_title(domain, fontsize=10)
        axis.margins(x=0.08)
        axis.tick_params(axis="x", labelsize=8)
        axis.locator_params(axis="x", nbins=4)
    labels = [f"{variant} − {control}" for variant, control in pairs]
    axes[0].set_yticks(range(len(pairs)), labels, fontsize=9)
    axes[0].invert_yaxis()
    figure.supxlabel(
        "difference in final evaluation lm_loss (nats per token; left is better)", fontsize=10
    )
    figure.suptitle(
        f"Variant minus control, paired by seed: mean, 95% interval, seeds; grey: ±{margin:g}",
        fontsize=11,
    )
    return figure


def plot_losses(
    losses: pd.DataFrame, variants: Sequence[str], comparisons: Sequence[Comparison]
) -> Figure:
    """Above: evaluation lm_loss over steps, mean over seeds. Below: variant minus control.

    The differences are means over the seeds of both at the same step; their spread at the end is
    what `plot_comparisons` shows. Comparisons at equal FLOPs have no step in common.
    """
    panels = list(dict.fromkeys(losses["domain"]))
    figure = Figure(figsize=(3.5 + 2.0 * len(panels), 5.6), layout="constrained")
    axes = figure.subplots(2, len(panels), sharex=True, squeeze=False)
    for column, domain in enumerate(panels):
        here = losses[losses["domain"] == domain]
        table = here.drop_duplicates(["variant", "seed", "step"], keep="last").pivot(
            index=["seed", "step"], columns="variant", values="lm_loss"
        )
        above, below = axes[:, column]
        earlier = Counter[str]()  # a variant keeps its line against every control
        for place, variant in enumerate(variants):
            if variant in table:
                mean = table[variant].dropna().groupby("step").mean()
                above.plot(mean.index, mean, label=variant, **style(place))
        for comparison in comparisons:
            variant, control = comparison.variant, comparison.control
            if comparison.matched == "steps" and variant in table and control in table:
                gap = (table[variant] - table[control]).dropna().groupby("step").mean()
                line = style(variants.index(variant))
                line["marker"] = MARKERS[earlier[variant] % len(MARKERS)]
                earlier[variant] += 1
                below.plot(gap.index, gap, label=f"{variant} − {control}", **line)
        below.axhline(0, color=GREY, linewidth=0.8)
        above.set_title(domain, fontsize=10)
        for axis in (above, below):
            axis.tick_params(labelsize=8)
    axes[0, 0].set_ylabel("evaluation lm_loss\n(nats per token)", fontsize=10)
    axes[1, 0].set_ylabel("variant minus control\n(nats per token)", fontsize=10)
    for axis in axes[:, -1]:
        if axis.get_legend_handles_labels()[0]:  # a variant alone is compared with nothing
            axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    figure.supxlabel("training step", fontsize=10)
    return figure


def plot_specialisation(table: pd.DataFrame) -> Figure:
    """Bits per variant and layer: a dot per seed, a line at the mean, a tick at the permuted mean.

    Null models are grey: what a router gives that has learned nothing.
    """
    labels = [label for label in (DOMAIN_LABEL, TYPE_LABEL) if (table["label"] == label).any()]
    layers = sorted(table["layer"].unique())
    is_null = table.drop_duplicates("variant").set_index("variant")["router"].isin(NULL_ROUTERS)
    order = [*is_null.index[is_null], *is_null.index[~is_null]]
    present = [set(table.loc[table["layer"] == layer, "variant"]) for layer in layers]
    columns = [[variant for variant in order if variant in here] for here in present]
    widths = [max(2, len(variants)) for variants in columns]
    figure = Figure(
        figsize=(max(5.0, 2.0 + 0.42 * sum(widths)), 3.1 * len(labels) + 0.9), layout="constrained"
    )
    axes = figure.subplots(
        len(labels), len(layers), squeeze=False, sharex="col", sharey="row", width_ratios=widths
    )
    for (row, column), axis in np.ndenumerate(axes):
        label, layer, variants = labels[row], layers[column], columns[column]
        for place, variant in enumerate(variants):
            here = (table["variant"] == variant) & (table["label"] == label)
            runs = table[here & (table["layer"] == layer)]
            if not len(runs):
                continue
            colour = GREY if is_null[variant] else COLOURS[0]
            spread = place + np.linspace(-0.18, 0.18, len(runs))
            axis.plot(spread, runs["bits"], "o", color=colour, ms=4, alpha=0.8)
            axis.hlines(runs["bits"].mean(), place - 0.3, place + 0.3, color=colour, linewidth=2)
            axis.hlines(
                runs["permuted_mean"].mean(), place - 0.3, place + 0.3,
                color=COLOURS[1], linewidth=1.5, linestyle=":",
            )  # fmt: skip
        axis.set_xticks(range(len(variants)), variants, rotation=45, ha="right", fontsize=8)
        if row == 0:
            axis.set_title(f"layer {layer}", fontsize=10)
        if column == 0:
            axis.set_ylabel(f"I(expert; {label}) (bits)")
    for axis in axes[:, 0]:  # only now: a limit set earlier stops shared axes from growing
        axis.set_ylim(bottom=0)
    figure.suptitle(
        "Dots: seeds; line: mean; dotted: permuted labels; grey: null models", fontsize=10
    )
    return figure


def plot_lengths(table: pd.DataFrame) -> Figure:
    """Left: variant minus control over the length of training. Right: bits. Bars: 95% intervals."""
    figure = Figure(figsize=(11, 4.0), layout="constrained")
    titles = {
        LOSS: "difference in final lm_loss (nats per token)",
        BITS: "I(expert; domain), mean over layers (bits)",
    }
    for axis, (measure, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        here = table[table["measure"] == measure]
        for place, (of, runs) in enumerate(here.groupby("of", sort=False)):
            reach = [runs["mean"] - runs["low"], runs["high"] - runs["mean"]]
            axis.errorbar(
                runs["steps"], runs["mean"], reach, label=of, marker="o", ms=5, capsize=3,
                **style(place),
            )  # fmt: skip
        steps = sorted(here["steps"].unique())
        axis.set_xscale("log")
        axis.set_xticks(steps, [f"{step:,}" for step in steps])
        axis.minorticks_off()
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        if len(here):
            axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        if measure == LOSS:
            axis.axhline(0, color=GREY, linewidth=0.8)
    figure.supxlabel("training steps, each length with a schedule of its own", fontsize=10)
    return figure


def plot_loads(largest: pd.DataFrame, variants: Sequence[str], threshold: float) -> Figure:
    """Largest share of any expert of any layer over steps, a panel per variant, a line per seed."""
    shown = [variant for variant in variants if (largest["variant"] == variant).any()]
    columns = min(4, max(1, len(shown)))
    rows = -(-len(shown) // columns) or 1
    figure = Figure(figsize=(2.7 * columns + 0.6, 2.1 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axis, variant in zip(axes, shown, strict=False):
        runs = largest[largest["variant"] == variant]
        for place, (_, run) in enumerate(runs.groupby("seed")):
            axis.plot(run["step"], run["largest_share"], linewidth=1.1, **style(place))
        axis.axhline(threshold, color=GREY, linestyle=":", linewidth=1)
        axis.set_title(variant, fontsize=10)
        axis.set_ylim(0, 1)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    figure.supxlabel("training step", fontsize=10)
    figure.supylabel("largest expert's share", fontsize=10)
    figure.suptitle("A line per seed; dotted: the collapse detector's threshold", fontsize=10)
    return figure


def plot_warning(study: CollapseStudy) -> Figure:
    """Left: ROC of every score over runs. Right: onset and warning before each collapse, steps."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
    areas = study.ranking.set_index("score")["auc"]
    for place, (name, curve) in enumerate(study.roc.groupby("score", sort=False)):
        left.plot(
            curve["false_positive_rate"], curve["true_positive_rate"],
            label=f"{name}: AUC {areas[name]:.2f}", color=COLOURS[place], linestyle=LINES[place],
        )  # fmt: skip
    left.set_xlabel("share of healthy runs warned of")
    left.set_ylabel("share of collapses warned of")
    left.legend(fontsize=8, loc="lower right")
    ill = study.runs[study.runs["judged"] & study.runs["collapsed"]].reset_index(drop=True)
    right.hlines(range(len(ill)), ill["onset_step"], ill["collapse_step"], color=GREY)
    for kind, marker, colour in (("warning", "<", 0), ("onset", "o", 4), ("collapse", "X", 1)):
        steps = ill[f"{kind}_step"].astype(float)
        right.plot(steps, range(len(ill)), marker, color=COLOURS[colour], label=kind)
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1), frameon=False)
    right.set_yticks(range(len(ill)), ill["variant"] + " " + ill["seed"].astype(str), fontsize=8)
    right.set_xlabel("training step")
    return figure

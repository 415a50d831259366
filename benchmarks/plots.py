"""Figures of a results document. The only room that needs matplotlib."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np

from benchmarks.results import Document, Row
from benchmarks.tables import fits

COLOURS = {
    "sequential": "#222222",
    "auto": "#d62728",
    "fused": "#ff7f0e",
    "grouped": "#1f77b4",
    "dense-floor": "#999999",
    "dense": "#999999",
    "hf-eager": "#98df8a",
    "hf-batched_mm": "#bcbd22",
    "hf-grouped_mm": "#2ca02c",
    "hf-emergence": "#e6550d",
    "hf-deepgemm": "#636363",
    "hf-sonicmoe": "#756bb1",
    "liger": "#9467bd",
    "megablocks": "#8c564b",
    "scattermoe": "#e377c2",
    "predecessor": "#17becf",
    "fused-micro": "#56b4e9",
}
MARKERS = "os^DvP*X<>ph"
_PLAIN = mpl.ticker.FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:.3g}")


def draw_all(document: Document, folder: Path, suffix: str) -> list[str]:
    """Write every figure that the rows allow, as PNG and SVG; the names of the PNG files."""
    figures: dict[str, Callable[[Sequence[Row]], Any]] = {
        "speedup": draw_speedup,
        "roofline": draw_roofline,
        "memory": draw_memory,
        "training": draw_training,
        "scaling": draw_scaling,
    }
    names = []
    for name, draw in figures.items():
        figure = draw(document.rows)
        if figure is None:
            continue
        env = document.environment
        versions = " ".join(
            f"{p} {env['packages'][p]}" for p in ("torch", "triton") if p in env["packages"]
        )
        origin = f"{env['device_name']}, {versions}, {env['date'][:10]}"
        figure.supxlabel(origin, x=0.995, ha="right", fontsize=7, color="#666666")
        for kind in ("png", "svg"):
            figure.savefig(folder / f"{name}-{suffix}.{kind}", dpi=130)
        plt.close(figure)
        names.append(f"{name}-{suffix}.png")
    return names


def draw_speedup(rows: Sequence[Row]) -> Any:
    """Speed-up over sequential of a full pass, with quartiles over the rounds."""
    return _dots(
        rows,
        lambda row: row.speedup,
        lambda row: row.speedup_quartiles,
        "speed-up over sequential, forward and backward (right of the line is faster)",
        reference=1.0,
    )


def draw_roofline(rows: Sequence[Row]) -> Any:
    """Fraction of the measured roofline that a full pass reaches."""
    return _dots(
        rows,
        lambda row: row.roofline_fraction,
        lambda row: None,
        "share of the device's measured rate, forward and backward",
        reference=1.0,
        logarithmic=False,
    )


def draw_memory(rows: Sequence[Row]) -> Any:
    """Memory kept for the backward pass."""
    return _dots(
        rows,
        lambda row: row.saved_bytes and row.saved_bytes / 1e6,
        lambda row: None,
        "MB kept for the backward pass",
    )


def _dots(
    rows: Sequence[Row],
    value: Callable[[Row], float | None],
    spread: Callable[[Row], tuple[float, float] | None],
    label: str,
    *,
    reference: float | None = None,
    logarithmic: bool = True,
) -> Any:
    """One line per group, one dot per contestant that is ranked."""
    full = [r for r in rows if r.suite == "layer" and r.phase == "full" and r.is_ranked]
    groups = sorted(dict.fromkeys(r.group for r in full), key=_group_order)[::-1]
    if not groups:
        return None
    contestants = list(dict.fromkeys(r.contestant for r in full))
    figure, axes = plt.subplots(figsize=(9, 1.9 + 0.34 * len(groups)), layout="constrained")
    for i, name in enumerate(contestants):
        own = [r for r in full if r.contestant == name and value(r)]
        y = np.array([groups.index(r.group) for r in own], float)
        # side by side, so that equal values stay visible
        y += 0.5 * (i / max(len(contestants) - 1, 1) - 0.5)
        x = np.array([value(r) for r in own], float)
        spreads = [spread(r) for r in own]
        errors = None
        if all(spreads):
            low, high = np.array(spreads, float).reshape(-1, 2).T
            errors = np.clip([x - low, high - x], 0, None)
        axes.errorbar(
            x,
            y,
            xerr=errors,
            fmt=MARKERS[i % len(MARKERS)],
            color=COLOURS.get(name, "#000000"),
            markersize=5,
            elinewidth=0.8,
            label=name,
        )
    if reference is not None:
        axes.axvline(reference, color="#222222", linewidth=0.8, zorder=0)
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(_PLAIN)
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
    axes.set_yticks(range(len(groups)), groups, fontsize=8)
    axes.set_ylim(-0.6, len(groups) - 0.4)
    axes.grid(axis="x", which="both", linewidth=0.3)
    axes.set_xlabel(label)
    figure.legend(loc="outside upper center", ncols=6, fontsize=8, frameon=False)
    return figure


def draw_training(rows: Sequence[Row]) -> Any:
    """Tokens per second of whole optimizer steps."""
    own = [r for r in rows if r.suite == "training" and r.is_ranked]
    groups = list(dict.fromkeys(r.group for r in own))
    if not groups:
        return None
    figure, panels = plt.subplots(
        1,
        len(groups),
        figsize=(max(4.5, 3.4 * len(groups)), 3.6),
        layout="constrained",
        squeeze=False,
    )
    for axes, group in zip(panels[0], groups, strict=True):
        bars = [r for r in own if r.group == group]
        names = [r.contestant for r in bars]
        speeds = [r.tokens_per_s or 0.0 for r in bars]
        drawn = axes.bar(names, speeds, color=[COLOURS.get(n, "#000000") for n in names])
        axes.bar_label(drawn, [f"{s:,.0f}" for s in speeds], fontsize=7)
        axes.set_title(group, fontsize=9)
        axes.tick_params(axis="x", rotation=35, labelsize=8)
        axes.margins(y=0.12)
    panels[0][0].set_ylabel("tokens/s, whole optimizer step")
    return figure


def draw_scaling(rows: Sequence[Row]) -> Any:
    """Time against tokens, experts and experts per token, and memory against tokens, with fits."""
    found = fits(rows)
    if not found:
        return None
    dtype = next(iter(found))[1]
    panels = (
        ("tokens", "seconds", "time against tokens"),
        ("experts", "seconds", "time against experts, active FLOPs fixed"),
        ("top_k", "seconds", "time against experts per token"),
        ("tokens", "saved bytes", "memory against tokens"),
    )
    figure, axes_grid = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for axes, (sweep, quantity, title) in zip(axes_grid.flat, panels, strict=True):
        of_panel = {
            k: f for k, f in found.items() if (k[0], k[1], k[3]) == (sweep, dtype, quantity)
        }
        for i, ((_, _, name, _), fit) in enumerate(of_panel.items()):
            points = [
                (r.parameters[sweep], r.median_s if quantity == "seconds" else r.saved_bytes)
                for r in rows
                if r.suite == "scaling"
                and r.is_ranked
                and r.contestant == name
                and r.parameters["sweep"] == sweep
                and r.parameters["dtype"] == dtype
            ]
            x, y = np.array(points, float).T
            scale = 1e3 if quantity == "seconds" else 1e-6
            colour = COLOURS.get(name, "#000000")
            label = f"{name}: {fit.exponent:+.2f} ± {fit.standard_error:.2f}"
            axes.plot(x, scale * y, MARKERS[i], color=colour, label=label)
            ends = np.array([x.min(), x.max()])
            axes.plot(ends, [scale * fit.at(e) for e in ends], "-", color=colour, linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter(_PLAIN)
        axes.yaxis.set_major_formatter(_PLAIN)
        axes.set_title(f"{title} ({dtype})", fontsize=9)
        axes.set_xlabel(sweep)
        axes.set_ylabel("ms" if quantity == "seconds" else "MB kept for backward")
        axes.grid(which="both", linewidth=0.3)
        axes.legend(fontsize=7, title="exponent", title_fontsize=7)
    return figure


def _group_order(group: str) -> tuple[str, ...]:
    shape, activation, dtype, routing = group.split("/")
    return activation, dtype, shape, routing

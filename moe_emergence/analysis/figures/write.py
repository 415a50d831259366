"""Every figure that the tables of an analysis allow, as PNG and SVG, and one animation."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from moe_emergence.analysis.figure_file import lay_out, save
from moe_emergence.analysis.figures import subjects
from moe_emergence.analysis.figures.panels import QUANTITY, grid, panel_name
from moe_emergence.analysis.tidy import FIGURES as FOLDER
from moe_emergence.analysis.tidy import read_tables
from moe_emergence.disk import clear_unfinished, remove_file, whole_file
from moe_emergence.progress import progress_bar


@dataclass(frozen=True)
class FigureOf:
    """A figure, the table its numbers are in, and what it shows in a sentence."""

    table: str
    draw: Callable[[pd.DataFrame], Figure | None]
    caption: str


FIGURES: dict[str, FigureOf] = {
    "expert_domain": FigureOf(
        "expert_domain", subjects.plot_expert_domain,
        "Share of each domain's assignments that every expert gets, by layer.",
    ),
    "expert_domain_slots": FigureOf(
        "expert_domain", subjects.plot_expert_slots,
        "The same for every choice of a token: its most probable expert, the next, and so on.",
    ),
    "expert_token_type": FigureOf(
        "expert_token_type", subjects.plot_token_types,
        "Share of each token type's assignments that every expert gets.",
    ),
    "information": FigureOf(
        "information", subjects.plot_information,
        "Bits that the expert tells of the domain (95% interval over blocks of text), beside "
        "what 95% of random routers that read the same hidden states stay below, and permuted "
        "domains.",
    ),
    "type_information": FigureOf(
        "information", subjects.plot_type_information,
        "Bits that the first expert tells of the token's type within its domain.",
    ),
    "entropy": FigureOf(
        "routing", subjects.plot_entropy,
        "Entropy of a token's router probabilities, and of their mean over tokens.",
    ),
    "predictability": FigureOf(
        "routing", subjects.plot_predictability,
        "How often neighbouring tokens share the first expert, and how much of it the token's id "
        "alone tells.",
    ),
    "load": FigureOf(
        "expert_load", subjects.plot_load, "Share of all assignments that every expert gets."
    ),
    "imbalance": FigureOf(
        "routing", subjects.plot_violation, "How far loads are from even (0 is even)."
    ),
    "coactivation": FigureOf(
        "coactivation", subjects.plot_coactivation,
        "How much more often than their loads explain two experts see the same token.",
    ),
    "vocabulary_specialisation": FigureOf(
        "vocabulary_specialisation", subjects.plot_vocabulary,
        "How exclusively an expert gets the vocabulary that it sees.",
    ),
    "knockout": FigureOf(
        "knockout", subjects.plot_knockout,
        "Loss per domain when an expert is taken away, over that of the whole model.",
    ),
    "modules": FigureOf(
        "module_damage", subjects.plot_modules,
        "What every domain loses without the experts that were named as a domain's module.",
    ),
    "retention": FigureOf(
        "retention", subjects.plot_retention,
        "What every domain loses when only a domain's best experts are kept, or random ones.",
    ),
    "regret": FigureOf(
        "regret", subjects.plot_regret,
        "How much lower a token's loss is with its router's expert than with one drawn evenly "
        "(95% interval over tokens), and how much lower yet it would be with the best one.",
    ),
    "similarity": FigureOf(
        "similarity", subjects.plot_similarity,
        "Cosine between experts: of their weights, of what training added, of their outputs.",
    ),
    "movement": FigureOf(
        "movement", subjects.plot_movement, "How far experts have moved from their common start."
    ),
    "saturation": FigureOf(
        "saturation", subjects.plot_saturation,
        "Share of the last checkpoint's assignments that earlier checkpoints had already.",
    ),
    "router_gradients": FigureOf(
        "router_gradients", subjects.plot_router_gradients,
        "Cosine between the gradients of each loss at a router's weight on two halves of a text: "
        "1 where both ask for the same change, 0 where for unrelated ones.",
    ),
    "training": FigureOf(
        "training", subjects.plot_training, "Evaluation loss over training, per domain."
    ),
    "collapse": FigureOf(
        "collapse", subjects.plot_collapse, "The largest expert's share over training."
    ),
    "load_over_training": FigureOf(
        "load_over_training", subjects.plot_load_over_training,
        "Every expert's share of the assignments over training.",
    ),
    "entropy_over_training": FigureOf(
        "entropy_over_training", subjects.plot_entropy_over_training,
        "Mean entropy of a token's router probabilities over training.",
    ),
}  # fmt: skip
TRAJECTORY = "trajectory"
MILLISECONDS = 500
"""That the animation shows a step."""


def write_figures(folder: Path) -> list[Path]:
    """Draw all figures that `folder/tables` allows into `folder/figures`; stale ones are deleted.

    Raises:
        RunError: when the disk is full or not writable, naming the path.
    """
    tables = read_tables(folder)
    place = folder / FOLDER
    clear_unfinished(place)
    written: list[Path] = []
    with progress_bar("figures", len(FIGURES) + 1) as advance:
        for name, figure_of in FIGURES.items():
            table = tables.get(figure_of.table)
            figure = None if table is None else figure_of.draw(table)
            if figure is not None:
                files = [place / f"{name}.{suffix}" for suffix in ("png", "svg")]
                save(figure, *files)
                written += files
            advance(1)
        if TRAJECTORY in tables:
            written.append(place / f"{TRAJECTORY}.gif")
            _animate(tables[TRAJECTORY], written[-1])
        advance(1)
    for stale in set(place.glob("*")) - set(written):
        if stale.suffix in (".png", ".svg", ".gif"):
            remove_file(stale)
    return written


def animation(table: pd.DataFrame) -> tuple[Figure, list[int], Callable[[int], list[Artist]]]:
    """Expert x domain fractions over checkpoints: the figure, its steps, and what draws a step."""
    steps = sorted(table["step"].unique())
    groups = list(table.groupby(["run", "layer"], sort=False))
    experts = table["expert"].nunique()
    figure, axes = grid(len(groups), min(9, 1.6 + 0.3 * experts), 1.6)
    top = 100 * float(table["fraction"].max())
    images = []
    for axis, (key, group) in zip(axes, groups, strict=True):
        domains = list(dict.fromkeys(group["domain"]))
        blank = [[0.0] * experts] * len(domains)
        images.append(axis.imshow(blank, cmap=QUANTITY, vmin=0, vmax=top, aspect="auto"))
        axis.set_yticks(range(len(domains)), domains, fontsize=7)
        axis.set_title(panel_name(("run", "layer"), key, table), fontsize=9, loc="left")
        axis.set_xlabel("expert", fontsize=8)
    figure.colorbar(images[0], ax=axes, label="share of the\ndomain (%)")

    def draw(step: int) -> list[Artist]:
        for image, (_, group) in zip(images, groups, strict=True):
            now = group[group["step"] == step]
            if len(now):
                shares = now.pivot_table("fraction", "domain", "expert", sort=False)
                image.set_data(100 * shares.to_numpy())
        figure.suptitle(f"step {step}", fontsize=10)
        return list(images)

    return figure, [int(step) for step in steps], draw


def _animate(table: pd.DataFrame, path: Path) -> None:
    figure, steps, draw = animation(table)
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(80)
    draw(steps[-1])
    lay_out(figure)
    frames = []
    for step in steps:
        draw(step)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    with whole_file(path) as new:
        frames[0].save(
            new, "GIF", save_all=True, append_images=frames[1:], duration=MILLISECONDS, loop=0
        )

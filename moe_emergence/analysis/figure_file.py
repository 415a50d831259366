"""Figures to files: laid out once, and the same bytes for the same numbers."""

from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from moe_emergence.disk import whole_file


def lay_out(figure: Figure) -> None:
    """Place everything once, which takes as long as drawing: each file and frame would do it."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")


def save(figure: Figure, *paths: Path, dpi: int = 130) -> None:
    """Write a figure as PNG or SVG, as each path's suffix says, whole or not at all.

    Raises:
        RunError: when the disk is full or not writable, naming the path.
    """
    lay_out(figure)
    for path in paths:
        with whole_file(path) as new:
            # `savefig` would draw a figure that once had a layout twice
            if path.suffix == ".svg":
                # a date and ids drawn by chance would differ
                with matplotlib.rc_context({"svg.hashsalt": path.stem}):
                    FigureCanvasSVG(figure).print_svg(new, metadata={"Date": None})
            else:
                figure.set_dpi(dpi)
                FigureCanvasAgg(figure).print_png(new)

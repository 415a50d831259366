"""The figures of an analysis, each from the table of numbers beside it."""

from moe_emergence.analysis.figures.write import FIGURES, FigureOf, write_figures

__all__ = ["FIGURES", "FigureOf", "write_figures"]

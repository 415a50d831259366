"""Colours of experts and domains, in pages and terminals.

The first six are Okabe and Ito's, but for a lighter blue. The others are colours of a
256-colour terminal, each in turn the one farthest (in OKLab) from those before it, with normal
vision and, up to the twelfth, with simulated protanopia, deuteranopia and tritanopia (Machado,
Oliveira and Fernandes 2009) too. So the first twelve can be told apart with any of these, all 64
with normal vision, and where there are more than twelve a number stands beside the colour. Black
text can be read on each.
"""

PALETTE = (
    "#4D79FF", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#C6C6C6", "#AFAF87",
    "#AF5FAF", "#00D7FF", "#00875F", "#87D787", "#FF00D7", "#00FF00", "#FF005F", "#FFD75F",
    "#FFAFFF", "#AF87FF", "#0087AF", "#808080", "#878700", "#00FFAF", "#D700FF", "#FF875F",
    "#AF5F5F", "#AFAFFF", "#FF87AF", "#FFD7D7", "#FFAFAF", "#FF5FFF", "#AFD700", "#8787D7",
    "#5FAF5F", "#00AFAF", "#AF8787", "#87D7D7", "#D7D7FF", "#FFAF5F", "#D7AFD7", "#D787D7",
    "#87AFAF", "#5FD700", "#00AF00", "#D7875F", "#D7D787", "#0087D7", "#D75FAF", "#AF5FD7",
    "#AFAF00", "#D7AF87", "#87875F", "#5F5FFF", "#AFAFD7", "#FF87D7", "#D78700", "#00D787",
    "#B2B2B2", "#D7AFFF", "#5FD7AF", "#5F8700", "#FFAFD7", "#5FFF5F", "#87D7FF", "#FF5F87",
)  # fmt: skip
FOR_ANY_EYE = 12
"""So many of the first can be told apart with any common colour vision."""

TERMINAL_16 = (
    "blue", "yellow", "green", "magenta", "cyan", "red", "bright_blue", "bright_yellow",
    "bright_green", "bright_magenta", "bright_cyan", "bright_red",
)  # fmt: skip
"""Where a terminal has no more than 16 colours."""

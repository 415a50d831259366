"""Colours of experts and domains, in pages and terminals.

The first six are Okabe and Ito's. The others are colours of a 256-colour terminal, each in turn the
one farthest (in OKLab) from those before it, with normal vision and, up to the twelfth, with
simulated protanopia, deuteranopia and tritanopia (Machado, Oliveira and Fernandes 2009) too. So the
first twelve can be told apart with any of these, all 64 with normal vision, and where there are
more than twelve a number stands beside the colour. Black text can be read on each.
"""

PALETTE = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#C6C6C6", "#AFAF87",
    "#8787FF", "#00D7FF", "#87D787", "#875FD7", "#FF00FF", "#00FF00", "#FF0087", "#FFD75F",
    "#FFAFFF", "#767676", "#D787FF", "#878700", "#D700AF", "#FF5F5F", "#00FFAF", "#AFAFFF",
    "#FF5FD7", "#AF875F", "#FFAF87", "#AF5F5F", "#FF87AF", "#0087FF", "#FFD7D7", "#00D75F",
    "#AFD700", "#008787", "#AF87D7", "#5FAF5F", "#00AFAF", "#D700FF", "#87D7D7", "#D7D7FF",
    "#949494", "#D7AFD7", "#87AFAF", "#00AF00", "#D78787", "#AF5FD7", "#D78700", "#AFD7AF",
    "#0087AF", "#D7D787", "#D75FAF", "#AFAF00", "#AF5F87", "#D7AF87", "#AFAFD7", "#FF87D7",
    "#B2B2B2", "#FFAFD7", "#D7AFFF", "#5FD7AF", "#5F8700", "#87875F", "#5FFF5F", "#FF8787",
)  # fmt: skip
FOR_ANY_EYE = 12
"""So many of the first can be told apart with any common colour vision."""

TERMINAL_16 = (
    "blue", "yellow", "green", "magenta", "cyan", "red", "bright_blue", "bright_yellow",
    "bright_green", "bright_magenta", "bright_cyan", "bright_red",
)  # fmt: skip
"""Where a terminal has no more than 16 colours."""

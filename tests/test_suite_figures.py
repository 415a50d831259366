"""Figures of a suite's report show every number they are given, and tell lines apart."""

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from moe_emergence.experiments.description import Comparison
from moe_emergence.experiments.figures import plot_losses, plot_specialisation


def bits_of_two_layers(deeper: float) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "variant": variant, "router": router, "seed": seed, "layer": layer,
                "label": "domain", "bits": bits + seed / 10, "permuted_mean": 0.01,
            }
            for variant, router in (("frozen", "frozen"), ("moe", "learned"))
            for layer, bits in ((2, 0.1), (3, deeper))
            for seed in range(3)
        ]
    )  # fmt: skip


def test_every_seed_is_inside_the_axes() -> None:
    figure = plot_specialisation(bits_of_two_layers(deeper=1.2))
    figure.draw_without_rendering()
    for axis, layer in zip(figure.axes, (2, 3), strict=True):
        low, high = axis.get_ylim()
        shown = np.concatenate([np.asarray(line.get_ydata(), float) for line in axis.lines])
        assert len(shown) == 6, layer
        assert low == 0
        assert shown.max() <= high


def flat_losses(variants: list[str]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"variant": variant, "seed": 0, "domain": domain, "step": step, "lm_loss": 3.0}
            for variant in variants
            for domain in ("all", "code", "math", "prose")
            for step in (0, 10)
        ]
    )


def lines_below(variants: list[str], pairs: list[Comparison]) -> list[Line2D]:
    """The lines of differences in the first panel."""
    below = plot_losses(flat_losses(variants), variants, pairs).axes[4]
    return [line for line in below.lines if not str(line.get_label()).startswith("_")]


def looks(lines: list[Line2D]) -> set[tuple[object, ...]]:
    return {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}


def test_a_variant_against_two_controls_has_two_lines() -> None:
    pairs = [Comparison("top2", control, "better?", "steps") for control in ("moe", "dense")]
    lines = lines_below(["dense", "moe", "top2"], pairs)
    assert [line.get_label() for line in lines] == ["top2 − moe", "top2 − dense"]
    assert len(looks(lines)) == 2
    assert len({line.get_color() for line in lines}) == 1


def test_no_two_of_many_differences_look_alike() -> None:
    variants = [f"v{place}" for place in range(20)]
    pairs = [Comparison(variant, "v0", "", "steps") for variant in variants[1:]]
    pairs += [Comparison(variant, "v1", "", "steps") for variant in variants[2:]]
    assert len(looks(lines_below(variants, pairs))) == len(pairs)

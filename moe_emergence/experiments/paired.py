"""Statistics of differences paired by seed: interval, effect size, test and equivalence test."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

CONFIDENCE = 0.95
MIN_SEEDS = 3
"""Pairs below which no verdict is given: the interval of two spans most of what is plausible."""


@dataclass(frozen=True)
class PairedDifference:
    """Variant minus control over n seeds; `nan` where n is too small for it."""

    n: int
    mean: float
    low: float
    high: float
    """95% t-interval of the mean."""
    cohen_dz: float
    """Mean over standard deviation of the differences (Cohen 1988)."""
    hedges_g: float
    """`cohen_dz` without its small-sample bias (Hedges 1981, n - 1 degrees of freedom)."""
    p: float
    """Two-sided paired t-test of no difference."""
    p_equivalence: float
    """Two one-sided t-tests (Schuirmann 1987): the mean lies within the margin."""


def paired_difference(
    differences: Sequence[float], margin: float | None = None
) -> PairedDifference:
    """Summarise differences of pairs that share a seed.

    Args:
        differences: variant minus control, one per seed; any unit.
        margin: half-width of the range that counts as no difference, in that unit; without one
            there is no equivalence test.

    Raises:
        ValueError: when the margin is not positive.
    """
    if margin is not None and not margin > 0:
        raise ValueError(f"--margin {margin}: give a positive number of nats per token")
    values = np.asarray(differences, dtype=np.float64)
    n, nan = values.size, math.nan
    mean = float(values.mean()) if n else nan
    if n < 2:
        return PairedDifference(n, mean, nan, nan, nan, nan, nan, nan)
    if np.ptp(values) == 0:
        # the limits of both tests as the spread goes to zero
        outside = nan if margin is None else float(abs(mean) >= margin)
        return PairedDifference(n, mean, mean, mean, nan, nan, float(mean == 0), outside)
    test = stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(CONFIDENCE)
    effect = float(test.statistic) / math.sqrt(n)
    equivalence = nan if margin is None else DescrStatsW(values).ttost_mean(-margin, margin)[0]
    return PairedDifference(
        n,
        mean,
        float(low),
        float(high),
        effect,
        effect * small_sample_correction(n - 1),
        float(test.pvalue),
        float(equivalence),
    )


def small_sample_correction(degrees: int) -> float:
    """Hedges' J = Gamma(m/2) / (sqrt(m/2) Gamma((m-1)/2)); nan for one degree of freedom."""
    if degrees < 2:
        return math.nan
    logarithm = special.gammaln(degrees / 2) - special.gammaln((degrees - 1) / 2)
    return float(np.exp(logarithm) / math.sqrt(degrees / 2))


def holm(p_values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """p-values adjusted for their family (Holm 1979); `nan` stays and does not count."""
    values = np.asarray(p_values, dtype=np.float64)
    adjusted = values.copy()
    known = ~np.isnan(values)
    if known.any():
        adjusted[known] = multipletests(values[known], method="holm")[1]
    return adjusted


def verdict(mean: float, n: int, p: float, p_equivalence: float, alpha: float = 0.05) -> str:
    """In one word: what adjusted p-values say about a loss difference (lower is better).

    Equivalence wins over a difference that is real but smaller than the margin.
    """
    if n < MIN_SEEDS:
        return "too few seeds"
    if p_equivalence < alpha:
        return "equivalent"
    if p < alpha:
        return "better" if mean < 0 else "worse"
    return "undecided"

"""Paired differences: against scipy and statsmodels, coverage, equivalence and families."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.weightstats import ttost_paired

from moe_emergence.experiments.paired import (
    holm,
    paired_difference,
    small_sample_correction,
    verdict,
)

DIFFERENCES = st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=12).filter(
    lambda values: np.std(values) > 1e-4
)


@given(DIFFERENCES, st.floats(0.001, 1))
def test_it_is_the_paired_t_test_and_the_two_one_sided_ones(
    values: list[float], margin: float
) -> None:
    control = np.linspace(1, 2, len(values))
    variant = control + values
    found = paired_difference((variant - control).tolist(), margin)
    test = stats.ttest_rel(variant, control)
    assert found.p == pytest.approx(test.pvalue, rel=1e-6)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval()), rel=1e-6)
    assert found.p_equivalence == pytest.approx(
        ttost_paired(variant, control, -margin, margin)[0], rel=1e-5, abs=1e-12
    )
    assert found.cohen_dz == pytest.approx(np.mean(values) / np.std(values, ddof=1), rel=1e-4)
    assert abs(found.hedges_g) <= abs(found.cohen_dz)
    assert found.low <= found.mean <= found.high


@given(DIFFERENCES)
def test_swapping_the_two_changes_only_the_sign(values: list[float]) -> None:
    there, back = paired_difference(values, 0.1), paired_difference([-v for v in values], 0.1)
    assert there.mean == pytest.approx(-back.mean)
    assert there.low == pytest.approx(-back.high)
    assert there.p == pytest.approx(back.p)
    assert there.p_equivalence == pytest.approx(back.p_equivalence)


def test_correction_is_hedges_approximation_for_many_and_unbiased_for_few() -> None:
    for degrees in (4, 9, 49):
        assert small_sample_correction(degrees) == pytest.approx(
            1 - 3 / (4 * degrees - 1), abs=0.003
        )
    rng = np.random.default_rng(0)
    effects = [paired_difference(rng.normal(0.5, 1, 5).tolist()).hedges_g for _ in range(2000)]
    assert np.mean(effects) == pytest.approx(0.5, abs=0.05)


def test_intervals_cover_the_planted_difference() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        found = paired_difference(rng.normal(-0.03, 0.02, 5).tolist(), 0.01)
        covered += found.low <= -0.03 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


@pytest.mark.parametrize(
    ("mean", "spread", "expected"),
    [
        (-0.05, 0.005, "better"),
        (0.05, 0.005, "worse"),
        (0.001, 0.002, "equivalent"),
        (-0.004, 0.001, "equivalent"),  # real, but smaller than the margin
        (0.0, 0.05, "undecided"),
        (0.0, 0.0, "equivalent"),
        (0.2, 0.0, "worse"),
    ],
)
def test_verdicts(mean: float, spread: float, expected: str) -> None:
    values = mean + spread * np.array([-1.2, -0.6, 0, 0.6, 1.2])
    found = paired_difference(values.tolist(), 0.01)
    assert verdict(found.mean, found.n, found.p, found.p_equivalence) == expected


def test_equivalence_is_claimed_wrongly_in_at_most_five_per_cent() -> None:
    rng = np.random.default_rng(2)
    claims = [
        paired_difference(rng.normal(0.01, 0.004, 5).tolist(), 0.01).p_equivalence < 0.05
        for _ in range(1000)
    ]
    assert 0.02 < np.mean(claims) < 0.075


def test_few_seeds_have_no_verdict_and_one_has_no_interval() -> None:
    one = paired_difference([-0.1], 0.01)
    assert (one.n, one.mean) == (1, -0.1)
    assert math.isnan(one.low)
    assert math.isnan(one.p)
    assert verdict(one.mean, 1, one.p, one.p_equivalence) == "too few seeds"
    assert math.isnan(paired_difference([], 0.01).mean)
    assert math.isnan(paired_difference([0.1, 0.2, 0.3]).p_equivalence)
    with pytest.raises(ValueError, match="--margin -1"):
        paired_difference([0.1], -1)


def test_holm_by_hand_with_a_gap() -> None:
    assert holm([0.01, math.nan, 0.04, 0.03]) == pytest.approx(
        [0.03, math.nan, 0.06, 0.06], nan_ok=True
    )
    assert np.isnan(holm([math.nan])).all()

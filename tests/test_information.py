"""Information of experts and labels: against scikit-learn, brute force and known answers."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from sklearn.metrics import mutual_info_score

from moe_emergence.analysis import information as info

TABLES = hnp.arrays(np.int64, (3, 4), elements=st.integers(0, 30))


@given(TABLES)
def test_mutual_information_is_that_of_scikit_learn(table: np.ndarray) -> None:
    if table.sum() == 0:
        assert info.mutual_information(table) == 0
        return
    expected = mutual_info_score(None, None, contingency=table) / math.log(2)
    assert info.mutual_information(table) == pytest.approx(expected, abs=1e-9)


@given(TABLES)
def test_information_is_bounded_symmetric_and_scale_free(table: np.ndarray) -> None:
    bits = info.mutual_information(table)
    assert 0 <= bits <= math.log2(3) + 1e-9
    assert bits == pytest.approx(info.mutual_information(table.T), abs=1e-9)
    assert bits == pytest.approx(info.mutual_information(7 * table), abs=1e-9)
    assert -1e-9 <= info.share_of_label(table) <= 1 + 1e-9


def test_tables_are_treated_one_by_one() -> None:
    tables = np.random.default_rng(0).integers(0, 9, (5, 2, 3, 4))
    bits = info.mutual_information(tables)
    assert bits.shape == (5, 2)
    assert bits[3, 1] == info.mutual_information(tables[3, 1])
    assert info.miller_madow(tables)[3, 1] == info.miller_madow(tables[3, 1])


def test_known_answers() -> None:
    assert info.mutual_information(10 * np.eye(3)) == pytest.approx(math.log2(3))
    assert info.share_of_label(10 * np.eye(3)) == pytest.approx(1)
    assert info.mutual_information(np.full((3, 8), 5)) == pytest.approx(0, abs=1e-12)
    one_expert = np.zeros((3, 8))
    one_expert[:, 2] = 100
    assert info.mutual_information(one_expert) == pytest.approx(0, abs=1e-12)


def test_miller_madow_takes_out_most_of_the_bias() -> None:
    rng = np.random.default_rng(0)
    tables = rng.multinomial(200, np.full(24, 1 / 24), size=2000).reshape(-1, 3, 8)
    plug_in, corrected = info.mutual_information(tables).mean(), info.miller_madow(tables).mean()
    assert plug_in > 0.04
    assert abs(corrected) < plug_in / 10


@given(st.integers(1, 3), st.integers(0, 1000))
@settings(max_examples=20)
def test_counts_are_those_of_a_loop(top_k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts, labels = rng.integers(0, 5, (4, 6, top_k)), rng.integers(0, 3, (4, 6))
    expected = np.zeros((4, 3, 5), dtype=int)
    for r, t, k in itertools.product(range(4), range(6), range(top_k)):
        expected[r, labels[r, t], experts[r, t, k]] += 1
    found = info.label_counts(experts, labels, 3, 5)
    assert (found == expected).all()
    assert (info.expert_counts(experts, 5) == expected.sum(axis=1)).all()
    domains = np.array([0, 2, 2, 0])
    table = info.domain_table(info.expert_counts(experts, 5), domains, 3)
    assert (table[2] == expected[1:3].sum(axis=(0, 1))).all()


def test_domain_null_is_the_distribution_over_all_permutations() -> None:
    counts = np.random.default_rng(1).integers(0, 9, (6, 3))
    domains = np.array([0, 0, 1, 1, 2, 2])
    exact = [
        float(info.mutual_information(info.domain_table(counts, np.array(labels), 3)))
        for labels in set(itertools.permutations(domains.tolist()))
    ]
    test = info.domain_null(counts, domains, 3, permutations=4000, seed=0)
    assert np.mean(test.null) == pytest.approx(np.mean(exact), rel=0.03)
    assert set(np.round(test.null, 9)) <= set(np.round(exact, 9))
    expected_p = np.mean([value >= test.observed - info.TIE for value in exact])
    assert test.p_value == pytest.approx(expected_p, abs=0.04)


def test_p_values_are_uniform_when_blocks_differ_but_domains_do_not() -> None:
    """Blocks have experts of their own; permuting tokens instead would always reject."""
    rng = np.random.default_rng(2)
    domains = np.repeat(np.arange(3), 6)
    p_values = []
    for turn in range(200):
        shares = rng.dirichlet(np.full(4, 0.5), size=18)
        counts = np.stack([rng.multinomial(64, share) for share in shares])
        p_values.append(info.domain_null(counts, domains, 3, 99, turn).p_value)
    assert stats.kstest(p_values, "uniform").pvalue > 0.001
    assert np.mean(np.array(p_values) <= 0.05) < 0.12


def test_a_specialist_is_found_and_its_excess_is_less_than_its_bits() -> None:
    domains = np.repeat(np.arange(3), 8)
    counts = 32 * np.eye(3, 4, dtype=int)[domains]
    test = info.domain_null(counts, domains, 3, 199, 0)
    assert test.observed == pytest.approx(math.log2(3))
    assert test.p_value == 1 / 200
    assert 0 < test.excess < test.observed


@pytest.mark.parametrize("top_k", [1, 2])
def test_token_type_null_is_that_of_shuffled_types(top_k: int) -> None:
    rng = np.random.default_rng(3)
    scores = rng.random((120, 5))
    experts, types = np.argsort(scores, axis=1)[:, :top_k], rng.integers(0, 4, 120)
    test = info.token_type_null(experts, types, 6, 5, permutations=500, seed=0)

    def bits(labels: np.ndarray) -> float:
        counts = info.label_counts(experts[None], labels[None], 6, 5)
        return float(info.mutual_information(counts.sum(axis=0)))

    shuffled = [bits(rng.permutation(types)) for _ in range(500)]
    assert test.observed == pytest.approx(bits(types))
    assert stats.ks_2samp(test.null, shuffled).pvalue > 0.001


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    most=st.sampled_from([1, 30]),
    seed=st.integers(0, 1000),
)
def test_permuted_tables_keep_both_margins(shape: tuple[int, int], most: int, seed: int) -> None:
    table = np.random.default_rng(seed).integers(0, most + 1, shape)
    table[:, 0] += 1  # every row has counts
    drawn = np.concatenate(list(info.permuted_tables(table, 7, seed)))
    assert len(drawn) == 7
    assert (drawn >= 0).all()
    assert (drawn.sum(axis=2) == table.sum(axis=1)).all()
    assert (drawn.sum(axis=1) == table.sum(axis=0)[table.any(axis=0)]).all()


@pytest.mark.parametrize(("experts", "types"), [(1, 5), (4, 1), (1, 1)])
def test_one_expert_or_one_type_carries_nothing(experts: int, types: int) -> None:
    rng = np.random.default_rng(5)
    chosen, labels = rng.integers(0, experts, (400, 1)), rng.integers(0, types, 400)
    test = info.token_type_null(chosen, labels, 6, 5, permutations=19, seed=0)
    assert test.observed == pytest.approx(0, abs=1e-12)
    assert test.null == pytest.approx(np.zeros(19), abs=1e-12)
    assert test.p_value == 1


def test_conditional_information_weighs_the_domains() -> None:
    tests = [info.NullTest(1.0, np.array([0.2, 0.4])), info.NullTest(0.0, np.array([0.0, 0.2]))]
    pooled = info.conditional(tests, [300, 100])
    assert pooled.observed == pytest.approx(0.75)
    assert pooled.null == pytest.approx([0.15, 0.35])


def test_bootstrap_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(4)
    truth = np.array([[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]])
    bits, covered = info.mutual_information(truth), []
    for turn in range(60):
        blocks = [rng.multinomial(64, shares, size=30) for shares in truth]
        low, high = info.bootstrap_interval(
            blocks, info.mutual_information, resamples=200, seed=turn
        )
        assert high - low < 0.15
        covered.append(low < bits < high)
    assert sum(covered) >= 50


def test_bootstrap_resamples_blocks_within_their_domain() -> None:
    perfect = [np.tile(64 * np.eye(3, dtype=int)[d], (5, 1)) for d in range(3)]
    found = info.bootstrap_interval(perfect, info.mutual_information, resamples=50)
    assert found == pytest.approx((math.log2(3), math.log2(3)))
    one = [counts[:1] for counts in perfect]
    assert np.isnan(info.bootstrap_interval(one, info.mutual_information, resamples=10)).all()

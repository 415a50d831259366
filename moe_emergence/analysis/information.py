"""Mutual information of experts and labels, in bits, with its bias, null and interval.

The estimate from counts is never negative and biased upwards, so it is read beside what the same
tokens give when the labels mean nothing: `domain_null` and `token_type_null`.

Letters: N mixture layers, R blocks, L tokens per block, K experts per token, E experts, D domains,
Y labels, P permutations, B resamples.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special, stats

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float64]

# Equal tables summed in another order differ in the last bits; they must count as ties.
TIE = 1e-12
# Resampled or permuted tables made at once, in numbers of 8 bytes.
CHUNK = 8_000_000


def mutual_information(counts: npt.ArrayLike) -> Floats:
    """Plug-in I(row; column) in bits of the contingency tables (..., Y, E); (...).

    H(row) + H(column) - H(row, column) of the observed frequencies; 0 for a table without counts.
    """
    tables = np.asarray(counts, dtype=np.float64)
    joint = tables.reshape(*tables.shape[:-2], -1)
    information = _entropy(tables.sum(axis=-1)) + _entropy(tables.sum(axis=-2)) - _entropy(joint)
    return np.maximum(information, 0.0)


def miller_madow(counts: npt.ArrayLike) -> Floats:
    """`mutual_information` less its first-order bias (Miller 1955); can be negative.

    Each entropy gets (non-empty cells - 1) / (2 * observations) nats, which takes observations to
    be independent. Tokens of one text are not: the true bias is larger, see `domain_null`.
    """
    tables = np.asarray(counts, dtype=np.float64)
    filled = (
        np.count_nonzero(tables.sum(axis=-1), axis=-1)
        + np.count_nonzero(tables.sum(axis=-2), axis=-1)
        - np.count_nonzero(tables, axis=(-2, -1))
        - 1
    )
    total = np.maximum(tables.sum(axis=(-2, -1)), 1.0)
    corrected: Floats = mutual_information(tables) + filled / (2 * total * math.log(2))
    return corrected


def share_of_label(counts: npt.ArrayLike) -> Floats:
    """`mutual_information` of tables (..., Y, E) as a share of the labels' entropy (Theil's U).

    From 0 to 1; 0 where there is one label.
    """
    tables = np.asarray(counts, dtype=np.float64)
    whole = _entropy(tables.sum(axis=-1))
    return np.divide(mutual_information(tables), whole, out=np.zeros_like(whole), where=whole > 0)


def _entropy(counts: Floats) -> Floats:
    """Entropy in bits over the last axis; 0 where there are no counts."""
    total = counts.sum(axis=-1, keepdims=True)
    shares = counts / np.where(total > 0, total, 1.0)
    bits: Floats = special.entr(shares).sum(axis=-1) / math.log(2)
    return bits


def expert_counts(experts: Ints, num_experts: int) -> Ints:
    """Assignments (R, E) per block of the experts (R, L, K) of one layer."""
    rows = experts.shape[0]
    flat = np.arange(rows)[:, None, None] * num_experts + experts
    return np.bincount(flat.ravel(), minlength=rows * num_experts).reshape(rows, num_experts)


def label_counts(experts: Ints, labels: Ints, num_labels: int, num_experts: int) -> Ints:
    """Assignments (R, Y, E) per block, label of the token (R, L) and expert (R, L, K)."""
    rows = experts.shape[0]
    cell = (np.arange(rows)[:, None] * num_labels + labels)[:, :, None] * num_experts + experts
    size = rows * num_labels * num_experts
    return np.bincount(cell.ravel(), minlength=size).reshape(rows, num_labels, num_experts)


def domain_table(counts_RE: Ints, domains_R: Ints, num_domains: int) -> Ints:
    """Assignments (D, E) of all blocks of each domain."""
    table = np.zeros((num_domains, counts_RE.shape[1]), dtype=np.int64)
    np.add.at(table, domains_R, counts_RE)
    return table


@dataclass(frozen=True)
class NullTest:
    """An observed information beside its permutation null, in bits."""

    observed: float
    null: Floats
    """(P,) the information after each permutation."""

    @property
    def p_value(self) -> float:
        """(1 + permutations at least as large as the observed) / (1 + permutations)."""
        at_least = int(np.count_nonzero(self.null >= self.observed - TIE))
        return (1 + at_least) / (1 + self.null.size)

    @property
    def excess(self) -> float:
        """Observed less the null's mean: what the plug-in's bias does not explain."""
        return self.observed - float(self.null.mean())


def domain_null(
    counts_RE: Ints, domains_R: Ints, num_domains: int, permutations: int, seed: int
) -> NullTest:
    """I(expert; domain) against permuted domain labels of whole blocks.

    Tokens of a block share their text, so under the null it is blocks, not tokens, that could
    have carried any label. (A block still is not a document: neighbouring blocks may share one.)
    """
    rng = np.random.default_rng(seed)
    null = np.empty(permutations)
    step = max(1, CHUNK // max(1, num_domains * len(domains_R)))
    counts = counts_RE.astype(np.float64)
    for start in range(0, permutations, step):
        size = min(step, permutations - start)
        labels_PR = rng.permuted(np.tile(domains_R, (size, 1)), axis=1)
        indicator_PDR = labels_PR[:, None, :] == np.arange(num_domains)[:, None]
        null[start : start + size] = mutual_information(indicator_PDR.astype(np.float64) @ counts)
    observed = mutual_information(domain_table(counts_RE, domains_R, num_domains))
    return NullTest(float(observed), null)


def token_type_null(
    experts: Ints, types: Ints, num_types: int, num_experts: int, permutations: int, seed: int
) -> NullTest:
    """I(expert; token type) against types permuted among the tokens given: those of one domain.

    A token's K experts stay together, so what is permuted is its set of experts. Tokens are taken
    to be exchangeable within the domain, which neighbouring tokens are not quite; the null models
    of `experiments/specialisation.py` do not need that.

    Args:
        experts: (T, K) of the domain's T tokens.
        types: (T,) from 0 to `num_types` - 1.
    """
    sets, index = np.unique(np.sort(experts, axis=1), axis=0, return_inverse=True)
    table = np.zeros((len(sets), num_types), dtype=np.int64)
    np.add.at(table, (index.ravel(), types), 1)
    members = np.zeros((len(sets), num_experts))
    np.add.at(members, (np.arange(len(sets))[:, None], sets), 1.0)
    observed = mutual_information(table.T @ members)
    null = [
        mutual_information(np.swapaxes(drawn, 1, 2) @ members)
        for drawn in permuted_tables(table, permutations, seed)
    ]
    return NullTest(float(observed), np.concatenate(null))


def permuted_tables(table: Ints, permutations: int, seed: int) -> Iterator[Ints]:
    """Tables (size, Y', E') with the margins of `table` (Y, E), as permuted labels give them.

    Columns without counts are left out; rows must have some. The sizes add up to `permutations`.
    Drawn directly by `scipy.stats.random_table` (Patefield 1981).
    """
    used = table[:, table.any(axis=0)]
    if min(used.shape) == 1:  # the one possible table; SciPy 1.17 draws its last count negative
        yield np.broadcast_to(used, (permutations, *used.shape))
        return
    drawn = stats.random_table(used.sum(axis=1), used.sum(axis=0), seed=seed)
    for size in _chunks(permutations, table.size):
        yield drawn.rvs(size=size).reshape(size, *used.shape)


def conditional(tests: Sequence[NullTest], weights: Sequence[float]) -> NullTest:
    """The mean of independent tests: I(expert; type | domain) from one test per domain.

    Args:
        tests: one per domain, with equally many permutations.
        weights: share of the tokens of each domain.
    """
    share = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    observed = float(share @ [test.observed for test in tests])
    return NullTest(observed, share @ np.stack([test.null for test in tests]))


def largest_of_layers(observed_L: Floats, null_LN: Floats) -> Floats:
    """(L,) p-values of statistics of L layers against N draws each, adjusted over the layers.

    Westfall and Young's single-step maxT (1993): every layer is scaled by mean and standard
    deviation of its draws and itself, and compared with the largest layer of each draw. At most
    5% of models without an effect have any p below 0.05, whatever the number of layers and
    however they depend on each other; the smallest p is 1 / (N + 1).
    """
    together = np.concatenate([observed_L[:, None], null_LN], axis=1)
    spread = together.std(axis=1, keepdims=True)
    scaled = (together - together.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    largest_N = scaled[:, 1:].max(axis=0)
    as_large_L = (largest_N >= scaled[:, :1] - 1e-12).sum(axis=1)
    p_L: Floats = (1 + as_large_L) / (1 + null_LN.shape[1])
    return p_L


def bootstrap_interval(
    tables: Sequence[Ints],
    information: Callable[[Floats], Floats],
    *,
    resamples: int,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Basic bootstrap interval over blocks, each stratum resampled by itself.

    The basic interval mirrors the resampled values about the estimate, which takes out the upward
    bias that resampling adds to the plug-in; it is cut off at 0.

    Args:
        tables: per stratum (domain) the counts (R_d, ...) of its blocks.
        information: from the summed counts (..., D, ...) of the strata to bits (...).
    """
    blocks = [np.asarray(counts, dtype=np.float64) for counts in tables]

    def statistic(*indices: Ints, axis: int) -> Floats:
        sums = [
            counts[index].sum(axis=index.ndim - 1)
            for counts, index in zip(blocks, indices, strict=True)
        ]
        return information(np.stack(sums, axis=indices[0].ndim - 1))

    if any(len(counts) < 2 for counts in blocks):
        return math.nan, math.nan
    found = stats.bootstrap(
        [np.arange(len(counts)) for counts in blocks],
        statistic,
        n_resamples=resamples,
        batch=max(1, CHUNK // max(counts.size for counts in blocks)),
        vectorized=True,
        axis=-1,
        confidence_level=confidence,
        method="basic",
        rng=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    return max(float(low), 0.0), max(float(high), 0.0)


def _chunks(total: int, numbers_each: int) -> list[int]:
    """Sizes that add up to `total`, each at most `CHUNK` numbers large."""
    step = max(1, CHUNK // max(1, numbers_each))
    return [min(step, total - start) for start in range(0, total, step)]

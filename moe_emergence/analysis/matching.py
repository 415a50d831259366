"""Experts of two routers matched by the tokens that they share, and what is left different.

Letters: C cells (kinds of tokens), T tokens, E and F experts of the two routers, K and M experts
per token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Overlap:
    """How often a token of a cell has both an expert of one router and one of the other."""

    shared_CEF: Ints
    """(C, E, F) tokens."""
    tokens_C: Ints
    """(C,)"""
    per_token: int
    """Experts per token of the router that has fewer."""

    def match(self) -> Ints:
        """(E,) the other router's expert for each, -1 where it has fewer experts.

        Of all one-to-one matches the one with most tokens shared (Kuhn 1955).
        """
        shared_EF = self.shared_CEF.sum(axis=0)
        match_E = np.full(len(shared_EF), -1, np.int64)
        rows, columns = linear_sum_assignment(shared_EF, maximize=True)
        match_E[rows] = columns
        return match_E

    def kept(self, match_E: Ints) -> Ints:
        """(C,) assignments of a cell's tokens that both routers make, by `match_E`.

        At most `per_token` times its tokens.
        """
        known = np.flatnonzero(match_E >= 0)
        kept_C: Ints = self.shared_CEF[:, known, match_E[known]].sum(axis=1)
        return kept_C


@dataclass(frozen=True, eq=False)
class Choices:
    """The experts that two routers chose for the same tokens."""

    cells_T: npt.NDArray[np.int16]
    """(T,) what kind each token is of, 0 to C - 1."""
    one_TK: npt.NDArray[np.int16]
    """(T, K) distinct in a row."""
    other_TM: npt.NDArray[np.int16]
    """(T, M) distinct in a row."""
    shape: tuple[int, int, int]
    """C, E, F."""

    def overlap(self, order_T: Ints | None = None) -> Overlap:
        """Counted; with `order_T` the other router's choices are those of other tokens."""
        cells, experts, others = self.shape
        other_TM = self.other_TM if order_T is None else self.other_TM[order_T]
        first_TK = (self.cells_T[:, None].astype(np.int64) * experts + self.one_TK) * others
        counts = np.zeros(cells * experts * others, np.int64)
        for slot in range(other_TM.shape[1]):
            pairs = first_TK + other_TM[:, slot : slot + 1]
            counts += np.bincount(pairs.ravel(), minlength=len(counts))
        tokens_C = np.bincount(self.cells_T, minlength=cells)
        per_token = min(self.one_TK.shape[1], other_TM.shape[1])
        return Overlap(counts.reshape(self.shape), tokens_C, per_token)


def random_kept(
    choices: Choices, draws: int, seed: int, drawn: Callable[[int], None] = lambda _: None
) -> Ints:
    """(draws, C) what is kept, see `Overlap.kept`, between random routers with these loads.

    The other router's choices are dealt out to the tokens anew and experts matched anew, since a
    match made on a text fits some of its chance.

    Args:
        choices: of both routers.
        draws: permutations of the tokens.
        seed: of the permutations.
        drawn: called with 1 after each.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(draws):
        dealt = choices.overlap(rng.permutation(len(choices.cells_T)))
        rows.append(dealt.kept(dealt.match()))
        drawn(1)
    return np.array(rows)

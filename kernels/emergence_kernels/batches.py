"""Cutting the experts into batches, each of which is one batched matrix product.

Letters: E experts, S rows sorted by expert, Q rows of all batches with their padding, B experts of
a batch.
"""

import json
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from .permutation import Permutation

_EMPTY_ROWS = 16
"""Rows of a product that take as long as reading a weight that no row needs."""


@dataclass(frozen=True)
class BatchPlan:
    """How the experts are cut into batches."""

    product_cost: float
    """What starting one more product costs, in the FLOPs that could be done meanwhile: experts
    share a batch, padded to the longest, where the padding costs less."""
    elements: int
    """Of the widest intermediate result that a batch of several experts may have."""

    @cached_property
    def encoded(self) -> str:
        """As JSON, the form in which an operator's schema can carry it."""
        return json.dumps(asdict(self))

    @staticmethod
    @cache
    def decode(text: str) -> "BatchPlan":
        """The plan that `encoded` is of.

        Raises:
            ValueError: for anything else.
        """
        try:
            return BatchPlan(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a plan of batches: {error}") from error


def default_plan(dtype: torch.dtype, device: torch.device) -> BatchPlan:
    """What suits most machines; `--autotune` measures others.

    On a CPU a product in 16 bits starts slowly, and a batch should stay in the second-level caches.
    """
    if device.type == "cpu":
        cost = 9e6 if dtype.itemsize == 2 else 1e6
        return BatchPlan(cost, 128 * 1024 * torch.get_num_threads())
    return BatchPlan(1e9, 64 * 1024 * 1024)


@dataclass(frozen=True)
class Batch:
    """Neighbouring experts and their rows."""

    first: int
    end: int
    """Experts `first:end`; the last has rows."""
    length: int
    """Rows R of the longest, to which the others are padded."""
    start: int
    """Its first row among the Q."""
    own: slice
    """Its rows among the S."""

    @property
    def experts(self) -> slice:
        """Its experts."""
        return slice(self.first, self.end)

    @property
    def rows(self) -> slice:
        """Its rows among the Q."""
        return slice(self.start, self.start + (self.end - self.first) * self.length)

    @property
    def is_padded(self) -> bool:
        """Whether not all of them are rows of its own."""
        return self.own.stop - self.own.start < self.rows.stop - self.rows.start

    def view(self, rows_QN: Tensor) -> Tensor:
        """Its rows as (B, R, N)."""
        return rows_QN.view(self.end - self.first, self.length, -1)


def cut(bounds: list[int], width: int, row_flops: float, plan: BatchPlan) -> list[Batch]:
    """Batches that hold every expert with rows, in order.

    Args:
        bounds: (E+1,) first row of every expert.
        width: of the widest intermediate result.
        row_flops: of one row in one product.
        plan: what may share a batch.
    """
    batches: list[Batch] = []
    allowed = plan.product_cost / max(row_flops, 1)
    first = length = members = end = start = 0

    def close() -> int:
        own = slice(bounds[first], bounds[end])
        batches.append(Batch(first, end, length, start, own))
        return start + (end - first) * length

    for e, (begin, stop) in enumerate(pairwise(bounds)):
        if begin == stop:
            continue
        if members:
            longest = max(length, stop - begin)
            padded = (e + 1 - first) * longest
            empty = e - first - members
            padding = padded - (stop - bounds[first]) + empty * max(_EMPTY_ROWS - longest, 0)
            if padding <= allowed * members and padded * width <= plan.elements:
                length, members, end = longest, members + 1, e + 1
                continue
            start = close()
        first, length, members, end = e, stop - begin, 1, e + 1
    if members:
        close()
    return batches


class Layout:
    """Where sorted rows lie in the padded batches, and what lies in their padding.

    Padding repeats rows of the expert itself, so that what is not finite stays with its expert; it
    counts for nothing once scaled by `scales`.
    """

    def __init__(
        self, permutation: Permutation, width: int, row_flops: float, plan: BatchPlan
    ) -> None:
        offsets = permutation.expert_offsets
        bounds = offsets.tolist()
        self.batches = cut(bounds, width, row_flops, plan)
        self.num_used, self.num_rows = (
            bounds[-1],
            sum(b.end * b.length - b.first * b.length for b in self.batches),
        )
        """Rows with an expert, and Q."""
        self.is_padded = self.num_rows > self.num_used
        held = [(e, b.length) for b in self.batches for e in range(b.first, b.end)]
        self.without_rows = [e for e, (a, b) in enumerate(pairwise(bounds)) if a == b]
        """Experts whose gradients are 0."""
        sorted_S = torch.arange(len(permutation.perm), device=offsets.device)
        self._used_Q: Tensor | None = None
        self.rows_Q = sorted_S[: self.num_rows]
        """(Q,) int64: the sorted row that every row of a batch is, or repeats."""
        places_S = sorted_S
        if self.is_padded:
            experts, lengths = torch.tensor(held, device=offsets.device).unbind(1)
            begins, ends = offsets[experts].long(), offsets[experts + 1].long()
            starts = lengths.cumsum(0) - lengths
            size = {"output_size": self.num_rows}
            place_Q = torch.arange(self.num_rows, device=offsets.device)
            row_Q = place_Q + (begins - starts).repeat_interleave(lengths, **size)
            last_Q = (ends - 1).clamp(min=0).repeat_interleave(lengths, **size)
            used_Q = row_Q <= last_Q
            if self.without_rows:
                used_Q &= (ends > begins).repeat_interleave(lengths, **size)
            self._used_Q, self.rows_Q = used_Q, torch.minimum(row_Q, last_Q)
            places_S = torch.full_like(sorted_S, self.num_rows)
            places_S[self.rows_Q[used_Q]] = place_Q[used_Q]
        elif self.num_used < len(sorted_S):
            places_S = sorted_S.clamp(max=self.num_rows)
        self.places_S = places_S
        """(S,) int64: where every sorted row lies among the Q; Q for rows without an expert."""
        self.tokens_Q = permutation.token_idx.index_select(0, self.rows_Q)
        """(Q,) int64: the token of every row."""

    def scales(self, weights_TK: Tensor, perm_S: Tensor) -> Tensor:
        """(Q, 1) routing weight of every row, 0 in the padding."""
        scale_Q = weights_TK.reshape(-1).index_select(0, perm_S.index_select(0, self.rows_Q))
        if self._used_Q is not None:
            scale_Q = scale_Q.masked_fill_(~self._used_Q, 0)
        return scale_Q.unsqueeze(1)

    def scratch(self, like: Tensor, width: int) -> Tensor:
        """Memory for rows of any batch, to be written over by the next: it stays in the cache."""
        most = max((b.rows.stop - b.rows.start for b in self.batches), default=0)
        return like.new_empty(most, width)

    def combine(
        self, rows_QH: Tensor, inv_perm_S: Tensor, top_k: int, weights_TK: Tensor | None = None
    ) -> Tensor:
        """(T, H) sum of the K rows of every token, added up in at least fp32 and rounded once.

        `rows_QH` has a row more than the Q, of zeros, for rows without an expert; `weights_TK` has
        the dtype of the rows.
        """
        places_TK = self.places_S.index_select(0, inv_perm_S).view(-1, top_k)
        return functional.embedding_bag(
            places_TK, rows_QH, mode="sum", per_sample_weights=weights_TK
        )

"""Sorting routed rows by expert.

Letters: T tokens, K experts per token, E experts, S = T*K routed rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .operators import define, require, sizes_of, triton_is_installed


class Permutation(NamedTuple):
    """Where every routed row goes and comes back from. A flat slot is t*K + k."""

    perm: Tensor
    """(S,) int64: sorted row -> flat slot."""
    inv_perm: Tensor
    """(S,) int64: flat slot -> sorted row."""
    token_idx: Tensor
    """(S,) int64: sorted row -> token, `perm // K`."""
    expert_offsets: Tensor
    """(E+1,) int32: rows of expert e are `expert_offsets[e]:expert_offsets[e+1]`; starts with 0."""


def _sort(topk_experts_TK: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    if topk_experts_TK.is_cuda and triton_is_installed():
        from .gpu.permutation import sort_by_expert as counting_sort

        return counting_sort(topk_experts_TK.contiguous(), num_experts)
    flat_S = topk_experts_TK.reshape(-1)
    sorted_experts_S, perm_S = torch.sort(flat_S, stable=True)
    inv_perm_S = torch.empty_like(perm_S)
    inv_perm_S[perm_S] = torch.arange(perm_S.numel(), device=perm_S.device)
    boundaries = torch.arange(num_experts + 1, device=flat_S.device)
    expert_offsets = torch.searchsorted(sorted_experts_S, boundaries, out_int32=True)
    token_idx_S = torch.div(perm_S, topk_experts_TK.shape[1], rounding_mode="floor")
    return perm_S, inv_perm_S, token_idx_S, expert_offsets


def _fake_sort(topk_experts_TK: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    new, rows = topk_experts_TK.new_empty, topk_experts_TK.numel()
    return new(rows), new(rows), new(rows), new(num_experts + 1, dtype=torch.int32)


def _check_sort(topk_experts_TK: Tensor, num_experts: int) -> None:
    name = "sort_by_expert"
    sizes_of(name, [("topk_experts", "TK")], [topk_experts_TK])
    is_int = topk_experts_TK.dtype == torch.int64
    require(is_int, name, f"topk_experts is {topk_experts_TK.dtype}, not int64")
    require(num_experts >= 1, name, f"num_experts is {num_experts}, not at least 1")


_sort_by_expert = define(
    "sort_by_expert(Tensor topk_experts, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)",
    _sort,
    _fake_sort,
    _check_sort,
)


def sort_by_expert(topk_experts_TK: Tensor, num_experts: int) -> Permutation:
    """Stable sort of the T*K routed rows by expert, without host synchronisation.

    Args:
        topk_experts_TK: (T, K) int64, values in [0, num_experts).
        num_experts: E.

    Stability keeps the rows of one expert in token order, so two runs are bitwise equal.
    """
    return Permutation(*_sort_by_expert(topk_experts_TK, num_experts))

"""Sorting routed rows by expert.

Letters: T tokens, K experts per token, E experts, S = T*K routed rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor


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


def sort_by_expert(topk_experts_TK: Tensor, num_experts: int) -> Permutation:
    """Stable sort of the T*K routed rows by expert, without host synchronisation.

    Args:
        topk_experts_TK: (T, K) int64, values in [0, num_experts).
        num_experts: E.

    Stability keeps the rows of one expert in token order, so two runs are bitwise equal.
    """
    flat_S = topk_experts_TK.reshape(-1)
    sorted_experts_S, perm_S = torch.sort(flat_S, stable=True)
    inv_perm_S = torch.empty_like(perm_S)
    inv_perm_S[perm_S] = torch.arange(perm_S.numel(), device=perm_S.device)
    boundaries = torch.arange(num_experts + 1, device=flat_S.device)
    expert_offsets = torch.searchsorted(sorted_experts_S, boundaries, out_int32=True)
    token_idx_S = torch.div(perm_S, topk_experts_TK.shape[1], rounding_mode="floor")
    return Permutation(perm_S, inv_perm_S, token_idx_S, expert_offsets)

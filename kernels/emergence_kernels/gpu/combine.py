"""Combine: every token gathers its K rows and sums them, so that nothing is added concurrently. And
gather, where every sorted row is a sum of one.

Letters: T tokens, H model width, E experts, K experts per token, S = T*K routed rows sorted by
expert.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, next_power_of_2


@triton.jit
def _combine_fwd_kernel(
    rows_ptr,  # (S, H) sorted by expert, rows STRIDE apart
    inv_perm_ptr,  # (S,) int64: the sorted row of every slot t*K + k
    weights_ptr,  # (T, K) contiguous, read if WEIGHTED
    expert_offsets_ptr,  # (E+1,) int32, read if BOUNDED: rows from the last on count as zero
    y_ptr,  # (T, H) out
    num_tokens,
    H: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    E: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid: (token blocks, blocks of H)."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (t < num_tokens)[:, None] & (h < H)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_H), dtype=tl.float32)
    for k in tl.static_range(K):
        slot = t * K + k
        row = tl.load(inv_perm_ptr + slot, mask=t < num_tokens, other=0)
        there = inside
        if BOUNDED:
            there = inside & (row < tl.load(expert_offsets_ptr + E))[:, None]
        part = tl.load(rows_ptr + row[:, None] * STRIDE + h[None, :], mask=there, other=0.0)
        part = part.to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights_ptr + slot, mask=t < num_tokens, other=0.0)
            part = part * weight.to(tl.float32)[:, None]
        total += part
    tl.store(y_ptr + t[:, None] * H + h[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)


def combine(
    rows_SH: Tensor,
    inv_perm_S: Tensor,
    top_k: int,
    weights_TK: Tensor | None,
    expert_offsets: Tensor | None = None,
) -> Tensor:
    """Sum (T, H) over k of `weights[t, k] * rows[inv_perm[t*K + k]]`, in fp32, rounded once.

    Without `weights_TK` (T, K) the rows are added as they are. Rows from the last of
    `expert_offsets` (E+1,) on count as zero. Rows are contiguous.
    """
    hidden = rows_SH.shape[1]
    num_tokens = inv_perm_S.numel() // top_k
    y_TH = rows_SH.new_empty(num_tokens, hidden)
    block_h = min(next_power_of_2(hidden), 1024)
    block_t = max(2048 // block_h, 1)
    launch(
        _combine_fwd_kernel,
        (cdiv(num_tokens, block_t), cdiv(hidden, block_h)),
        rows_SH,
        inv_perm_S,
        weights_TK,
        expert_offsets,
        y_TH,
        num_tokens,
        H=hidden,
        K=top_k,
        STRIDE=rows_SH.stride(0),
        E=0 if expert_offsets is None else len(expert_offsets) - 1,
        WEIGHTED=weights_TK is not None,
        BOUNDED=expert_offsets is not None,
        BLOCK_T=block_t,
        BLOCK_H=block_h,
        num_warps=4,
    )
    return y_TH


def gather(x_TH: Tensor, token_idx_S: Tensor) -> Tensor:
    """`x[token_idx]` (S, H), contiguous. The rows of `x_TH` are contiguous.

    Products that gather while they load are slower on Hopper by more than this copy takes: a tile
    of scattered rows needs an address per row, a tile of neighbouring ones a single descriptor.
    """
    return combine(x_TH, token_idx_S, 1, None)

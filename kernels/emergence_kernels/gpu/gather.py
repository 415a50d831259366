"""Gather: every routed row's token, so that the products read whole tiles of neighbouring rows.

Letters: T tokens, H model width, S routed rows sorted by expert.
"""

import triton
import triton.language as tl
from torch import Tensor

from emergence_kernels.gpu.launch import cdiv, launch, next_power_of_2


@triton.jit
def _gather_fwd_kernel(
    x_ptr,  # (T, H) tokens, rows STRIDE_X apart
    token_idx_ptr,  # (S,) int64: the token of every sorted row
    rows_ptr,  # (S, H) out
    num_rows,
    H: tl.constexpr,
    STRIDE_X: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid: (blocks of S, blocks of H)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (row < num_rows)[:, None] & (h < H)[None, :]
    token = tl.load(token_idx_ptr + row, mask=row < num_rows, other=0)
    x = tl.load(x_ptr + token[:, None] * STRIDE_X + h[None, :], mask=inside)
    tl.store(rows_ptr + row[:, None] * H + h[None, :], x, mask=inside)


def gather(x_TH: Tensor, token_idx_S: Tensor) -> Tensor:
    """`x[token_idx]` (S, H), contiguous. The rows of `x_TH` are contiguous.

    Products that gather while they load are slower on Hopper by more than this copy takes: a tile
    of scattered rows needs an address per row, a tile of neighbouring ones a single descriptor.
    """
    num_rows, hidden = token_idx_S.numel(), x_TH.shape[1]
    rows_SH = x_TH.new_empty(num_rows, hidden)
    block_h = min(next_power_of_2(hidden), 1024)
    block_s = max(2048 // block_h, 1)
    launch(
        _gather_fwd_kernel,
        (cdiv(num_rows, block_s), cdiv(hidden, block_h)),
        x_TH,
        token_idx_S,
        rows_SH,
        num_rows,
        H=hidden,
        STRIDE_X=x_TH.stride(0),
        BLOCK_S=block_s,
        BLOCK_H=block_h,
        num_warps=4,
    )
    return rows_SH

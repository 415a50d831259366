"""The gradients that are sums: of the biases over rows, of the routing weights over columns.

Partial sums of tiles are written out and added in one order, never atomically.
Letters: T tokens, H model width, E experts, K experts per token, S = T*K routed rows sorted by
expert, M row tiles, N column tiles, W width of what is summed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emergence_kernels.gpu.launch import cdiv, launch, next_power_of_2
from emergence_kernels.gpu.tiles import expert_tiles, locate_tile, tile_bound
from emergence_kernels.permutation import Permutation

_ROWS_PER_TILE = 64


@triton.jit
def _output_bias_bwd_kernel(
    dy_ptr,  # (S, H) gradient of the output, a row per sorted row
    perm_ptr,  # (S,) int64: the slot t*K + k of every sorted row
    weights_ptr,  # (S,) routing weights by slot
    b2_ptr,  # (E, H) contiguous
    expert_offsets_ptr,  # (E+1,) int32: first sorted row of every expert
    db2_ptr,  # (M, H) fp32 out: every row tile's share of the gradient of b2
    dscale_ptr,  # (S,) fp32 out: <dy[token], b2[expert]> of every sorted row
    E: tl.constexpr,
    H: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid: (row tiles,)."""
    start_E, end_E, tiles_E = expert_tiles(expert_offsets_ptr, E, E_PAD, BLOCK_M)
    tile = tl.program_id(0)
    if tile < tl.max(tiles_E, 0):
        expert, first, end = locate_tile(tile, start_E, end_E, tiles_E, E_PAD, BLOCK_M)
        row = first + tl.arange(0, BLOCK_M)
        slot = tl.load(perm_ptr + row, mask=row < end, other=0)
        scale = tl.load(weights_ptr + slot, mask=row < end, other=0.0).to(tl.float32)[:, None]
        dscale = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for first_h in range(0, H, BLOCK_H):
            h = first_h + tl.arange(0, BLOCK_H)
            inside = (row < end)[:, None] & (h < H)[None, :]
            dy_ptrs = dy_ptr + row.to(tl.int64)[:, None] * H + h[None, :]
            dy = tl.load(dy_ptrs, mask=inside, other=0.0).to(tl.float32)
            b2 = tl.load(b2_ptr + expert * H + h, mask=h < H, other=0.0).to(tl.float32)
            dscale += tl.sum(dy * b2[None, :], 1)
            db2_ptrs = db2_ptr + tile.to(tl.int64) * H + h
            tl.store(db2_ptrs, tl.sum(dy * scale, 0), mask=h < H)
        tl.store(dscale_ptr + row, dscale, mask=row < end)


def output_bias_gradient(
    dy_SH: Tensor,
    weights_TK: Tensor,
    b2_EH: Tensor,
    permutation: Permutation,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What the bias of the down projection takes part in; `dy_SH` is contiguous.

    Returns:
        Its gradient (E, H) in `dtype`, and `<dy[token], b2[expert]>` (S,) fp32, its share of the
        gradient of every sorted row's routing weight.
    """
    num_experts, hidden = b2_EH.shape
    num_rows = permutation.perm.numel()
    tiles = tile_bound(num_rows, num_experts, _ROWS_PER_TILE)
    db2_MH = torch.empty(tiles, hidden, dtype=torch.float32, device=dy_SH.device)
    dscale_S = torch.empty(num_rows, dtype=torch.float32, device=dy_SH.device)
    launch(
        _output_bias_bwd_kernel,
        (tiles,),
        dy_SH,
        permutation.perm,
        weights_TK,
        b2_EH,
        permutation.expert_offsets,
        db2_MH,
        dscale_S,
        E=num_experts,
        H=hidden,
        E_PAD=next_power_of_2(num_experts),
        BLOCK_M=_ROWS_PER_TILE,
        BLOCK_H=64,
        num_warps=4,
    )
    db2_EH = sum_of_tiles(db2_MH, permutation.expert_offsets, _ROWS_PER_TILE, dtype)
    return db2_EH, dscale_S


@triton.jit
def _sum_of_tiles_bwd_kernel(
    tiles_ptr,  # (M, W) fp32 partial sums
    expert_offsets_ptr,  # (E+1,) int32: first sorted row of every expert
    sums_ptr,  # (E, W) out
    E: tl.constexpr,
    W: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    TILES_AT_ONCE: tl.constexpr,
):
    """Grid: (E, blocks of W)."""
    start_E, end_E, tiles_E = expert_tiles(expert_offsets_ptr, E, E_PAD, BLOCK_M)
    expert = tl.program_id(0)
    mine = tl.arange(0, E_PAD) == expert
    last = tl.sum(tl.where(mine, tiles_E, 0), 0)
    count = tl.sum(tl.where(mine, (end_E - start_E + BLOCK_M - 1) // BLOCK_M, 0), 0)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    total = tl.zeros((BLOCK_W,), dtype=tl.float32)
    for first in range(last - count, last, TILES_AT_ONCE):
        tile = first + tl.arange(0, TILES_AT_ONCE)
        inside = (tile < last)[:, None] & (w < W)[None, :]
        tile_ptrs = tiles_ptr + tile.to(tl.int64)[:, None] * W + w[None, :]
        total += tl.sum(tl.load(tile_ptrs, mask=inside, other=0.0), 0)
    sums_ptrs = sums_ptr + expert.to(tl.int64) * W + w
    tl.store(sums_ptrs, total.to(sums_ptr.dtype.element_ty), mask=w < W)


def sum_of_tiles(
    tiles_MW: Tensor, expert_offsets: Tensor, rows_per_tile: int, dtype: torch.dtype
) -> Tensor:
    """Sum (E, W) of every expert's row tiles, each of `rows_per_tile` rows; zero for no rows."""
    num_experts, width = len(expert_offsets) - 1, tiles_MW.shape[1]
    sums_EW = tiles_MW.new_empty(num_experts, width, dtype=dtype)
    launch(
        _sum_of_tiles_bwd_kernel,
        (num_experts, cdiv(width, 128)),
        tiles_MW,
        expert_offsets,
        sums_EW,
        E=num_experts,
        W=width,
        E_PAD=next_power_of_2(num_experts),
        BLOCK_M=rows_per_tile,
        BLOCK_W=128,
        TILES_AT_ONCE=16,
        num_warps=4,
    )
    return sums_EW


@triton.jit
def _routing_weight_bwd_kernel(
    dscale_ptr,  # (N, S) fp32: every column tile's share, by sorted row
    bias_dscale_ptr,  # (S,) fp32: the bias's share, by sorted row, read if HAS_BIAS
    inv_perm_ptr,  # (S,) int64: the sorted row of every slot t*K + k
    dweights_ptr,  # (S,) out, by slot
    num_rows,
    N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of S,)."""
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < num_rows
    row = tl.load(inv_perm_ptr + slot, mask=inside, other=0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    dscale_ptrs = dscale_ptr + row
    for _ in range(N):
        total += tl.load(dscale_ptrs, mask=inside, other=0.0)
        dscale_ptrs += num_rows
    if HAS_BIAS:
        total += tl.load(bias_dscale_ptr + row, mask=inside, other=0.0)
    tl.store(dweights_ptr + slot, total.to(dweights_ptr.dtype.element_ty), mask=inside)


def routing_weight_gradient(
    dscale_NS: Tensor, bias_dscale_S: Tensor | None, inv_perm_S: Tensor, weights_TK: Tensor
) -> Tensor:
    """Gradient (T, K) of the routing weights from the shares of their sorted rows."""
    dweights_TK = torch.empty_like(weights_TK, memory_format=torch.contiguous_format)
    launch(
        _routing_weight_bwd_kernel,
        (cdiv(inv_perm_S.numel(), 256),),
        dscale_NS,
        bias_dscale_S,
        inv_perm_S,
        dweights_TK,
        inv_perm_S.numel(),
        N=len(dscale_NS),
        HAS_BIAS=bias_dscale_S is not None,
        BLOCK=256,
        num_warps=4,
    )
    return dweights_TK

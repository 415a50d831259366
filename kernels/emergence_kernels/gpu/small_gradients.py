"""The gradients that are sums: of the biases over rows, of the routing weights over columns.

Partial sums of tiles, their shares, are written out and added in one order, never atomically.
Letters: T tokens, H model width, P pre-activation width, E experts, K experts per token, S = T*K
routed rows sorted by expert, M row tiles, N column tiles, W width of what is summed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..permutation import Permutation
from .activation_gradient import ROWS_PER_TILE
from .launch import cdiv, launch, next_power_of_2
from .tiles import expert_tiles, locate_tile, tile_bound

_COLUMNS_PER_TILE = 64
_ROWS_AT_ONCE = 32
"""Of the routing weights' shares, which lie a column tile apart: a cache line of each."""


@triton.jit
def _output_bias_bwd_kernel(
    dy_ptr,  # (S, H) gradient of the output, a row per sorted row
    perm_ptr,  # (S,) int64: the slot t*K + k of every sorted row
    weights_ptr,  # (S,) routing weights by slot
    b2_ptr,  # (E, H) contiguous
    expert_offsets_ptr,  # (E+1,) int32: first sorted row of every expert
    db2_ptr,  # (M, H) fp32 out: every row tile's share of the gradient of b2
    dscale_ptr,  # (N, S) fp32 out: every column tile's share of <dy[token], b2[expert]>
    num_rows,
    E: tl.constexpr,
    H: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (column tiles of the first row tile, of the second, up to the most there can be,)."""
    start_E, end_E, tiles_E = expert_tiles(expert_offsets_ptr, E, E_PAD, BLOCK_M)
    tiles_n: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    tile_n = tl.program_id(0) % tiles_n
    tile_m = tl.program_id(0) // tiles_n
    if tile_m < tl.max(tiles_E, 0):
        expert, first, end = locate_tile(tile_m, start_E, end_E, tiles_E, E_PAD, BLOCK_M)
        row = first + tl.arange(0, BLOCK_M)
        h = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (row < end)[:, None] & (h < H)[None, :]
        slot = tl.load(perm_ptr + row, mask=row < end, other=0)
        scale = tl.load(weights_ptr + slot, mask=row < end, other=0.0).to(tl.float32)[:, None]
        dy_ptrs = dy_ptr + row.to(tl.int64)[:, None] * H + h[None, :]
        dy = tl.load(dy_ptrs, mask=inside, other=0.0).to(tl.float32)
        b2 = tl.load(b2_ptr + expert * H + h, mask=h < H, other=0.0).to(tl.float32)
        tl.store(db2_ptr + tile_m.to(tl.int64) * H + h, tl.sum(dy * scale, 0), mask=h < H)
        dscale_ptrs = dscale_ptr + tile_n.to(tl.int64) * num_rows + row
        tl.store(dscale_ptrs, tl.sum(dy * b2[None, :], 1), mask=row < end)


def output_bias_gradient(
    dy_SH: Tensor, weights_TK: Tensor, b2_EH: Tensor, permutation: Permutation
) -> tuple[Tensor, Tensor]:
    """What the bias of the down projection takes part in; `dy_SH` and `b2_EH` are contiguous.

    Returns:
        Every row tile's share (M, H) of its gradient, and every column tile's (N, S) of
        `<dy[token], b2[expert]>`, its part of the gradient of every row's routing weight; in fp32.
    """
    num_experts, hidden = b2_EH.shape
    num_rows = permutation.perm.numel()
    tiles_m = tile_bound(num_rows, num_experts, ROWS_PER_TILE)
    tiles_n = cdiv(hidden, _COLUMNS_PER_TILE)
    db2_MH = dy_SH.new_empty(tiles_m, hidden, dtype=torch.float32)
    dscale_NS = dy_SH.new_empty(tiles_n, num_rows, dtype=torch.float32)
    launch(
        _output_bias_bwd_kernel,
        (tiles_m * tiles_n,),
        dy_SH,
        permutation.perm,
        weights_TK,
        b2_EH,
        permutation.expert_offsets,
        db2_MH,
        dscale_NS,
        num_rows,
        E=num_experts,
        H=hidden,
        E_PAD=next_power_of_2(num_experts),
        BLOCK_M=ROWS_PER_TILE,
        BLOCK_N=_COLUMNS_PER_TILE,
        num_warps=4,
    )
    return db2_MH, dscale_NS


@triton.jit
def _sum_of_tiles(
    program, tiles_ptr, sums_ptr, expert_offsets_ptr, E: tl.constexpr, W: tl.constexpr,
    E_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Sum (E, W) over every expert's row tiles of (M, W) shares: one block of one expert."""
    start_E, end_E, tiles_E = expert_tiles(expert_offsets_ptr, E, E_PAD, BLOCK_M)
    blocks: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    expert = program // blocks
    mine = tl.arange(0, E_PAD) == expert
    last = tl.sum(tl.where(mine, tiles_E, 0), 0)
    count = tl.sum(tl.where(mine, (end_E - start_E + BLOCK_M - 1) // BLOCK_M, 0), 0)
    w = program % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    total = tl.zeros((BLOCK_W,), dtype=tl.float32)
    for first in range(last - count, last, AT_ONCE):
        tile = first + tl.arange(0, AT_ONCE)
        inside = (tile < last)[:, None] & (w < W)[None, :]
        tile_ptrs = tiles_ptr + tile.to(tl.int64)[:, None] * W + w[None, :]
        total += tl.sum(tl.load(tile_ptrs, mask=inside, other=0.0), 0)
    sums_ptrs = sums_ptr + expert.to(tl.int64) * W + w
    tl.store(sums_ptrs, total.to(sums_ptr.dtype.element_ty), mask=w < W)


@triton.jit
def _sum_of_shares(shares_ptr, row, end, num_rows, N: tl.constexpr, AT_ONCE: tl.constexpr):
    """Sum over N of the (N, S) shares of these rows, those from `end` on without any; as many
    loads in flight as at once."""
    total = tl.zeros(row.shape, dtype=tl.float32)
    for first in range(0, N, AT_ONCE):
        share = first + tl.arange(0, AT_ONCE)
        inside = (share < N)[:, None] & (row < end)[None, :]
        share_ptrs = shares_ptr + share.to(tl.int64)[:, None] * num_rows + row[None, :]
        total += tl.sum(tl.load(share_ptrs, mask=inside, other=0.0), 0)
    return total


@triton.jit
def _sums_bwd_kernel(
    db1_tiles_ptr,  # (M, P) fp32, read if P
    db2_tiles_ptr,  # (M, H) fp32, read if H
    dscale_ptr,  # (N, S) fp32, by sorted row, read if N
    bias_dscale_ptr,  # (N_BIAS, S) fp32, by sorted row, read if N
    expert_offsets_ptr,  # (E+1,) int32: first sorted row of every expert
    perm_ptr,  # (S,) int64: the slot t*K + k of every sorted row
    db1_ptr,  # (E, P) out
    db2_ptr,  # (E, H) out
    dweights_ptr,  # (S,) out, by slot
    num_rows,
    E: tl.constexpr,
    P: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    N_BIAS: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid: (blocks of db1, of db2, of the routing weights,)."""
    before_b2: tl.constexpr = E * ((P + BLOCK_W - 1) // BLOCK_W)
    before_weights: tl.constexpr = before_b2 + E * ((H + BLOCK_W - 1) // BLOCK_W)
    program = tl.program_id(0)
    if P > 0:  # noqa: SIM102 - what is not wanted is not compiled
        if program < before_b2:
            _sum_of_tiles(
                program, db1_tiles_ptr, db1_ptr, expert_offsets_ptr, E, P, E_PAD, BLOCK_M, BLOCK_W,
                AT_ONCE,
            )  # fmt: skip
    if H > 0:  # noqa: SIM102
        if (program >= before_b2) & (program < before_weights):
            _sum_of_tiles(
                program - before_b2, db2_tiles_ptr, db2_ptr, expert_offsets_ptr, E, H, E_PAD,
                BLOCK_M, BLOCK_W, AT_ONCE,
            )  # fmt: skip
    if N > 0:  # noqa: SIM102
        if program >= before_weights:
            row = (program - before_weights).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
            slot = tl.load(perm_ptr + row, mask=row < num_rows, other=0)
            # rows that no expert has are in no tile
            end = tl.load(expert_offsets_ptr + E)
            total = _sum_of_shares(dscale_ptr, row, end, num_rows, N, BLOCK_S)
            if N_BIAS > 0:
                total += _sum_of_shares(bias_dscale_ptr, row, end, num_rows, N_BIAS, BLOCK_S)
            dweights = total.to(dweights_ptr.dtype.element_ty)
            tl.store(dweights_ptr + slot, dweights, mask=row < num_rows)


def sums(
    db1_MP: Tensor | None,
    db2_MH: Tensor | None,
    dscale_NS: Tensor | None,
    bias_dscale_NS: Tensor | None,
    permutation: Permutation,
    weights_TK: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of b1 (E, P) and b2 (E, H) in `dtype`, and of the routing weights (T, K).

    Each from its shares, all in fp32; without them it is None. An expert without rows gets zero,
    and so does the weight of a row without an expert.
    """
    offsets, num_rows = permutation.expert_offsets, permutation.perm.numel()
    num_experts = len(offsets) - 1
    pre_width, hidden = (0 if s is None else s.shape[1] for s in (db1_MP, db2_MH))
    db1 = weights_TK.new_empty(num_experts, pre_width, dtype=dtype) if pre_width else None
    db2 = weights_TK.new_empty(num_experts, hidden, dtype=dtype) if hidden else None
    dweights_TK = None
    if dscale_NS is not None:
        dweights_TK = torch.empty_like(weights_TK, memory_format=torch.contiguous_format)
    blocks = num_experts * (cdiv(pre_width, 128) + cdiv(hidden, 128))
    launch(
        _sums_bwd_kernel,
        (blocks + (0 if dscale_NS is None else cdiv(num_rows, _ROWS_AT_ONCE)),),
        db1_MP,
        db2_MH,
        dscale_NS,
        bias_dscale_NS,
        offsets,
        permutation.perm,
        db1,
        db2,
        dweights_TK,
        num_rows,
        E=num_experts,
        P=pre_width,
        H=hidden,
        N=0 if dscale_NS is None else len(dscale_NS),
        N_BIAS=0 if bias_dscale_NS is None else len(bias_dscale_NS),
        E_PAD=next_power_of_2(num_experts),
        BLOCK_M=ROWS_PER_TILE,
        BLOCK_W=128,
        AT_ONCE=16,
        BLOCK_S=_ROWS_AT_ONCE,
        num_warps=4,
    )
    return db1, db2, dweights_TK

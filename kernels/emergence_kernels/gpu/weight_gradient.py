"""Gradient of one weight per expert: transposed rows times rows, over each expert's rows.

Letters: E experts, S routed rows sorted by expert, I and O the weight's two widths.
"""

import triton
import triton.language as tl
from torch import Tensor

from emergence_kernels.gpu.gemm_config import GemmConfig
from emergence_kernels.gpu.launch import cdiv, launch
from emergence_kernels.gpu.tiles import grouped_order


@triton.jit
def _rows_of(rows_ptr, row, end, GATHER: tl.constexpr):
    """Where sorted rows are found (BLOCK_K,) int64; what is behind `end` is not read."""
    return tl.load(rows_ptr + row, mask=row < end, other=0) if GATHER else row.to(tl.int64)


@triton.jit
def _weight_gradient_bwd_kernel(
    a_ptr,  # rows of the left factor, (*, I), STRIDE_A apart
    a_rows_ptr,  # (S,) int64: the row of every sorted row, read if GATHER_A
    b_ptr,  # rows of the right factor, (*, O), STRIDE_B apart
    b_rows_ptr,  # (S,) int64: the row of every sorted row, read if GATHER_B
    expert_offsets_ptr,  # (E+1,) int32: first sorted row of every expert
    dw_ptr,  # (E, I, O) out
    E: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    O: tl.constexpr,  # noqa: E741
    STRIDE_A: tl.constexpr,
    STRIDE_B: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (programs,); each walks over (expert, tile of the weight) pairs `programs` apart."""
    tiles_m: tl.constexpr = (I + BLOCK_M - 1) // BLOCK_M
    tiles_n: tl.constexpr = (O + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tl.program_id(0), E * tiles_m * tiles_n, tl.num_programs(0)):
        expert = tile // (tiles_m * tiles_n)
        tile_m, tile_n = grouped_order(tile % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
        start = tl.load(expert_offsets_ptr + expert)
        end = tl.load(expert_offsets_ptr + expert + 1)
        i = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        o = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        row = start + tl.arange(0, BLOCK_K)
        a_row = _rows_of(a_rows_ptr, row, end, GATHER_A)
        b_row = _rows_of(b_rows_ptr, row, end, GATHER_B)
        for _ in range(start, end, BLOCK_K):
            # both factors: the next expert's rows may hold infinities, and infinity times 0 is NaN
            mine = row < end
            a_ptrs = a_ptr + a_row[None, :] * STRIDE_A + (i % I)[:, None]
            b_ptrs = b_ptr + b_row[:, None] * STRIDE_B + (o % O)[None, :]
            a = tl.load(a_ptrs, mask=mine[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mine[:, None], other=0.0)
            accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
            # one round ahead: a load whose address waits for another load is not pipelined
            row += BLOCK_K
            a_row = _rows_of(a_rows_ptr, row, end, GATHER_A)
            b_row = _rows_of(b_rows_ptr, row, end, GATHER_B)
        tl.store(
            dw_ptr + expert.to(tl.int64) * (I * O) + i[:, None] * O + o[None, :],
            accumulator.to(dw_ptr.dtype.element_ty),
            mask=(i < I)[:, None] & (o < O)[None, :],
        )


def weight_gradient(
    a: Tensor,
    b: Tensor,
    expert_offsets: Tensor,
    config: GemmConfig,
    precision: str,
    *,
    a_rows_S: Tensor | None = None,
    b_rows_S: Tensor | None = None,
) -> Tensor:
    """`a[rows of e].T @ b[rows of e]` (E, I, O) for every expert e, zero for no rows.

    `a` (*, I) and `b` (*, O) are sorted by expert, or gathered through `a_rows_S` or `b_rows_S`
    (S,) int64; their rows are contiguous.
    """
    num_experts, inner, outer = len(expert_offsets) - 1, a.shape[1], b.shape[1]
    dw_EIO = a.new_empty(num_experts, inner, outer)
    tiles = cdiv(inner, config.block_m) * cdiv(outer, config.block_n) * num_experts
    launch(
        _weight_gradient_bwd_kernel,
        (config.programs(tiles, a.device),),
        a,
        a_rows_S,
        b,
        b_rows_S,
        expert_offsets,
        dw_EIO,
        E=num_experts,
        I=inner,
        O=outer,
        STRIDE_A=a.stride(0),
        STRIDE_B=b.stride(0),
        GATHER_A=a_rows_S is not None,
        GATHER_B=b_rows_S is not None,
        PRECISION=precision,
        **config.options(),
    )
    return dw_EIO

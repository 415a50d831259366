"""Sorted rows times one weight per expert: the down projection with its bias, and, with the weight
transposed, the gradients of both projections' inputs.

Letters: E experts, S routed rows sorted by expert, I input width, O output width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .descriptors import can_describe, describe_factors, multiply_described
from .gemm_config import GemmConfig
from .launch import cdiv, launch, next_power_of_2
from .tiles import (
    expert_tiles,
    grouped_order,
    locate_tile,
    multiply_rows,
    tile_bound,
)


@triton.jit
def _row_product_fwd_kernel(
    x_ptr,  # (S, I) contiguous, rows sorted by expert; its descriptor if TMA
    expert_offsets_ptr,  # (E+1,) int32: first sorted row of every expert
    w_ptr,  # (E, I, O) contiguous, or (E, O, I) if TRANSPOSED; its descriptor if TMA
    bias_ptr,  # (E, O) contiguous, read if HAS_BIAS
    y_ptr,  # (S, O) out
    E: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    O: tl.constexpr,  # noqa: E741
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (programs,); each walks over (row tile, column tile) pairs `programs` apart."""
    STRIDE_K: tl.constexpr = 1 if TRANSPOSED else O
    STRIDE_N: tl.constexpr = I if TRANSPOSED else 1
    start_E, end_E, tiles_E = expert_tiles(expert_offsets_ptr, E, E_PAD, BLOCK_M)
    tiles_m = tl.max(tiles_E, 0)
    tiles_n: tl.constexpr = (O + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = grouped_order(tile, tiles_m, tiles_n, GROUP_M)
        expert, first, end = locate_tile(tile_m, start_E, end_E, tiles_E, E_PAD, BLOCK_M)
        row = first + tl.arange(0, BLOCK_M)
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        wide_row = tl.where(row < end, row, 0).to(tl.int64)
        if TMA:
            y = multiply_described(
                x_ptr, first, w_ptr, expert, tile_n * BLOCK_N, I, TRANSPOSED, BLOCK_M, BLOCK_N,
                BLOCK_K, PRECISION, SPECIALIZE,
            )  # fmt: skip
        else:
            y = multiply_rows(
                x_ptr, wide_row * I, w_ptr + expert * (I * O), column % O, I, STRIDE_K, STRIDE_N,
                BLOCK_K, PRECISION,
            )  # fmt: skip
        if HAS_BIAS:
            y += tl.load(bias_ptr + expert * O + column % O)[None, :].to(tl.float32)
        tl.store(
            y_ptr + wide_row[:, None] * O + column[None, :],
            y.to(y_ptr.dtype.element_ty),
            mask=(row < end)[:, None] & (column < O)[None, :],
        )


def row_product(
    x_SI: Tensor,
    w: Tensor,
    bias_EO: Tensor | None,
    expert_offsets: Tensor,
    config: GemmConfig,
    precision: str,
    *,
    transposed: bool = False,
) -> Tensor:
    """`x[rows of e] @ w[e] + bias[e]` (S, O), rounded once.

    `w` is (E, I, O); with `transposed` it is (E, O, I) and `w[e].T` is meant.
    """
    if transposed and x_SI.dtype == torch.float32 and precision == "ieee":
        # without matrix units, columns that are not neighbours take three times as long
        w, transposed = w.mT.contiguous(), False
    num_rows, inner = x_SI.shape
    outer = w.shape[1] if transposed else w.shape[2]
    y_SO = x_SI.new_empty(num_rows, outer)
    tiles = tile_bound(num_rows, len(w), config.block_m) * cdiv(outer, config.block_n)
    tma = can_describe(config, x_SI, w)
    left, right = describe_factors(x_SI, w, config, transposed=transposed) if tma else (x_SI, w)
    launch(
        _row_product_fwd_kernel,
        (config.programs(tiles, x_SI.device),),
        left,
        expert_offsets,
        right,
        bias_EO,
        y_SO,
        E=len(w),
        I=inner,
        O=outer,
        TRANSPOSED=transposed,
        HAS_BIAS=bias_EO is not None,
        PRECISION=precision,
        TMA=tma,
        SPECIALIZE=tma and config.specialize,
        E_PAD=next_power_of_2(len(w)),
        **config.options(),
    )
    return y_SO

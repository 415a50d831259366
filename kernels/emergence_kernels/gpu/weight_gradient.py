"""Gradient of one weight per expert: transposed rows times rows, over each expert's rows.

Letters: E experts, S routed rows sorted by expert, I and O the weight's two widths.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .descriptors import can_describe, describe
from .gemm_config import GemmConfig
from .launch import cdiv, launch
from .tiles import CHAIN, grouped_order


@triton.jit
def _sum_of_rows(
    a_ptr, b_ptr, start, end, i, o, I: tl.constexpr, O: tl.constexpr,  # noqa: E741
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns `i` of the left factor, transposed, times columns `o` of the right one, in fp32."""
    accumulator = tl.zeros((i.shape[0], o.shape[0]), dtype=tl.float32)
    for first in range(start, end, BLOCK_K):
        # both factors: the next expert's rows may hold infinities, and infinity times 0 is NaN
        row = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        a_ptrs = a_ptr + row[None, :] * I + i[:, None]
        b_ptrs = b_ptr + row[:, None] * O + o[None, :]
        a = tl.load(a_ptrs, mask=(row < end)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(row < end)[:, None], other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def _weight_gradient_bwd_kernel(
    a_ptr,  # (S, I) left factor, contiguous; its descriptor if TMA
    b_ptr,  # (S, O) right factor, contiguous; its descriptor if TMA
    expert_offsets_ptr,  # (E+1,) int32: first sorted row of every expert
    dw_ptr,  # (E, I, O) out
    E: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    O: tl.constexpr,  # noqa: E741
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
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
        if TMA:
            last = end - (end - start) % BLOCK_K
            for first in range(start, last, BLOCK_K):
                a = a_ptr.load([first, tile_m * BLOCK_M])
                b = b_ptr.load([first, tile_n * BLOCK_N])
                accumulator = tl.dot(a.T, b, accumulator, input_precision=PRECISION)
            # as in `_sum_of_rows`, of the next expert's rows nothing may come in
            mine = last + tl.arange(0, BLOCK_K) < end
            a = tl.where(mine[:, None], a_ptr.load([last, tile_m * BLOCK_M]), 0.0)
            b = tl.where(mine[:, None], b_ptr.load([last, tile_n * BLOCK_N]), 0.0)
            accumulator = tl.dot(a.T, b, accumulator, input_precision=PRECISION)
        elif a_ptr.dtype.element_ty == tl.float32 and PRECISION == "ieee":
            for first in range(start, end, CHAIN):
                last = tl.minimum(first + CHAIN, end)
                accumulator += _sum_of_rows(
                    a_ptr, b_ptr, first, last, i % I, o % O, I, O, BLOCK_K, PRECISION
                )
        else:
            accumulator = _sum_of_rows(
                a_ptr, b_ptr, start, end, i % I, o % O, I, O, BLOCK_K, PRECISION
            )
        tl.store(
            dw_ptr + expert.to(tl.int64) * (I * O) + i[:, None] * O + o[None, :],
            accumulator.to(dw_ptr.dtype.element_ty),
            mask=(i < I)[:, None] & (o < O)[None, :],
        )


def weight_gradient(
    a_SI: Tensor,
    b_SO: Tensor,
    expert_offsets: Tensor,
    config: GemmConfig,
    precision: str,
    dtype: torch.dtype,
    *,
    transposed: bool = False,
) -> Tensor:
    """`a[rows of e].T @ b[rows of e]` (E, I, O) for every expert e, zero for no rows.

    Both are contiguous and sorted by expert; the result is in `dtype`, rounded once. It is
    contiguous, or with `transposed` a view of (E, O, I) that is.
    """
    if transposed:
        return weight_gradient(b_SO, a_SI, expert_offsets, config, precision, dtype).mT
    num_experts, inner, outer = len(expert_offsets) - 1, a_SI.shape[1], b_SO.shape[1]
    dw_EIO = a_SI.new_empty(num_experts, inner, outer, dtype=dtype)
    tiles = cdiv(inner, config.block_m) * cdiv(outer, config.block_n) * num_experts
    tma = can_describe(config, a_SI, b_SO)
    launch(
        _weight_gradient_bwd_kernel,
        (config.programs(tiles, a_SI.device),),
        describe(a_SI, config.block_k, config.block_m) if tma else a_SI,
        describe(b_SO, config.block_k, config.block_n) if tma else b_SO,
        expert_offsets,
        dw_EIO,
        E=num_experts,
        I=inner,
        O=outer,
        PRECISION=precision,
        TMA=tma,
        **config.options(),
    )
    return dw_EIO

"""Up projection: sorted rows times one weight per expert, plus its bias, activated.

Letters: H model width, F expert width, P pre-activation width (F, or 2F for SwiGLU),
E experts, S routed rows sorted by expert.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import Activation
from .activation_functions import gelu_tanh, silu
from .descriptors import can_describe, describe_factors, multiply_described
from .gemm_config import GemmConfig
from .launch import cdiv, launch, next_power_of_2
from .tiles import (
    expert_tiles,
    grouped_order,
    halves,
    locate_tile,
    multiply_rows,
    tile_bound,
)


@triton.jit
def _product(
    x_ptr, row, first_row, w1, expert, first_column, half, H: tl.constexpr, F: tl.constexpr,
    P: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows times columns from `half` (0 for gate, F for up) on of one expert."""
    if TMA:
        return multiply_described(
            x_ptr, first_row, w1, expert, half + first_column, H, TRANSPOSED, BLOCK_M, BLOCK_N,
            BLOCK_K, PRECISION, False,
        )  # fmt: skip
    else:
        column = half + (first_column + tl.arange(0, BLOCK_N)) % F
        w_ptr = w1 + expert * (H * P)
        STRIDE_K: tl.constexpr = 1 if TRANSPOSED else P
        STRIDE_N: tl.constexpr = H if TRANSPOSED else 1
        return multiply_rows(
            x_ptr, row * H, w_ptr, column, H, STRIDE_K, STRIDE_N, BLOCK_K, PRECISION
        )


@triton.jit
def _activate(
    pre,  # (BLOCK_M, columns) fp32: a part of the product, of its gate if GATED
    up,  # (BLOCK_M, columns) fp32: the same part of the other half, read if GATED
    b1_ptr,  # (E, P), read if HAS_BIAS
    expert,
    pre_ptr,  # (S, P) out
    act_ptr,  # (S, F) out
    row,  # (BLOCK_M,) sorted rows, those from `end` on are another expert's
    end,
    first_column,  # of F
    F: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PART: tl.constexpr,
):
    """Add the bias and write pre-activations and activations, at most PART elements at a time."""
    COLUMNS: tl.constexpr = pre.shape[1]
    if pre.shape[0] * COLUMNS > PART:
        left, right = halves(pre)
        up_left, up_right = halves(up) if GATED else (left, right)
        _activate(
            left, up_left, b1_ptr, expert, pre_ptr, act_ptr, row, end, first_column, F, GATED,
            HAS_BIAS, PART,
        )  # fmt: skip
        _activate(
            right, up_right, b1_ptr, expert, pre_ptr, act_ptr, row, end,
            first_column + COLUMNS // 2, F, GATED, HAS_BIAS, PART,
        )  # fmt: skip
    else:
        P: tl.constexpr = 2 * F if GATED else F
        column = first_column + tl.arange(0, COLUMNS)
        inside = (row < end)[:, None] & (column < F)[None, :]
        wide_row = row.to(tl.int64)[:, None]
        pre_ptrs = pre_ptr + wide_row * P + column[None, :]
        if HAS_BIAS:
            pre += tl.load(b1_ptr + expert * P + column % F)[None, :].to(tl.float32)
        tl.store(pre_ptrs, pre.to(pre_ptr.dtype.element_ty), mask=inside)
        if GATED:
            if HAS_BIAS:
                up += tl.load(b1_ptr + expert * P + F + column % F)[None, :].to(tl.float32)
            tl.store(pre_ptrs + F, up.to(pre_ptr.dtype.element_ty), mask=inside)
            act = silu(pre)[0] * up
        else:
            act = gelu_tanh(pre)[0]
        act_ptrs = act_ptr + wide_row * F + column[None, :]
        tl.store(act_ptrs, act.to(act_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _up_projection_fwd_kernel(
    x_ptr,  # (S, H) contiguous, rows sorted by expert; its descriptor if TMA
    expert_offsets_ptr,  # (E+1,) int32: first sorted row of every expert
    w1_ptr,  # (E, H, P) contiguous, or (E, P, H) if TRANSPOSED; its descriptor if TMA
    b1_ptr,  # (E, P) contiguous, read if HAS_BIAS
    pre_ptr,  # (S, P) out: pre-activations
    act_ptr,  # (S, F) out: activations
    E: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (programs,); each walks over (row tile, column tile) pairs `programs` apart."""
    P: tl.constexpr = 2 * F if GATED else F
    start_E, end_E, tiles_E = expert_tiles(expert_offsets_ptr, E, E_PAD, BLOCK_M)
    tiles_m = tl.max(tiles_E, 0)
    tiles_n: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = grouped_order(tile, tiles_m, tiles_n, GROUP_M)
        expert, first, end = locate_tile(tile_m, start_E, end_E, tiles_E, E_PAD, BLOCK_M)
        row = first + tl.arange(0, BLOCK_M)
        wide_row = tl.where(row < end, row, 0).to(tl.int64)
        pre = _product(
            x_ptr, wide_row, first, w1_ptr, expert, tile_n * BLOCK_N, 0, H, F, P, TRANSPOSED,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, TMA,
        )  # fmt: skip
        up = pre
        if GATED:
            up = _product(
                x_ptr, wide_row, first, w1_ptr, expert, tile_n * BLOCK_N, F, H, F, P, TRANSPOSED,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, TMA,
            )  # fmt: skip
        _activate(
            pre, up, b1_ptr, expert, pre_ptr, act_ptr, row, end, tile_n * BLOCK_N, F, GATED,
            HAS_BIAS, PART,
        )  # fmt: skip


def up_projection(
    x_SH: Tensor,
    w1: Tensor,
    b1_EP: Tensor | None,
    expert_offsets: Tensor,
    activation: Activation,
    config: GemmConfig,
    precision: str,
    *,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Pre-activations (S, P) `x[rows of e] @ w1[e] + b1[e]` and activations (S, F).

    `x_SH` is contiguous and sorted by expert. `w1` is (E, H, P), or with `transposed` (E, P, H),
    contiguous. Bias and activation are applied to the fp32
    accumulator; both results are rounded once.
    """
    if transposed and x_SH.dtype == torch.float32 and precision == "ieee":
        # as in `row_product`
        w1, transposed = w1.mT.contiguous(), False
    num_experts, hidden, pre_width = (w1.mT if transposed else w1).shape
    width = pre_width // 2 if activation == "swiglu" else pre_width
    num_rows = len(x_SH)
    pre_SP = x_SH.new_empty(num_rows, pre_width)
    act_SF = x_SH.new_empty(num_rows, width)
    tiles = tile_bound(num_rows, num_experts, config.block_m) * cdiv(width, config.block_n)
    tma = can_describe(config, x_SH, w1)
    left, right = describe_factors(x_SH, w1, config, transposed=transposed) if tma else (x_SH, w1)
    launch(
        _up_projection_fwd_kernel,
        (config.programs(tiles, x_SH.device),),
        left,
        expert_offsets,
        right,
        b1_EP,
        pre_SP,
        act_SF,
        E=num_experts,
        H=hidden,
        F=width,
        TRANSPOSED=transposed,
        GATED=activation == "swiglu",
        HAS_BIAS=b1_EP is not None,
        PART=512 * config.warps,  # 16 a thread: every target has the registers
        PRECISION=precision,
        TMA=tma,
        E_PAD=next_power_of_2(num_experts),
        **config.options(),
    )
    return pre_SP, act_SF

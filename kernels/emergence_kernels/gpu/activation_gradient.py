"""Backward of the down projection's input and of the activation in one product.

With A = act(pre), s the weight of a sorted row, r its token and dA' = dy[r] @ w2[e].T, one tile of
dA' gives the gradient of the pre-activation `s * dA' * act'(pre)`, the scaled activation `s * A`
that the weight gradient needs, the tile's share of `<dA', A>` (the gradient of s, arXiv 2512.14080)
and its share of the gradient of b1. A is recomputed from the pre-activation.

Letters: T tokens, H model width, F expert width, P pre-activation width (F, or 2F for SwiGLU),
E experts, K experts per token, S = T*K routed rows sorted by expert, M row tiles, N column tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emergence_kernels.activations import Activation
from emergence_kernels.gpu.activation_functions import gelu_tanh, silu
from emergence_kernels.gpu.descriptors import can_describe, describe_weight, multiply_described
from emergence_kernels.gpu.gemm_config import GemmConfig
from emergence_kernels.gpu.launch import cdiv, launch, next_power_of_2
from emergence_kernels.gpu.tiles import (
    expert_tiles,
    grouped_order,
    halves,
    locate_tile,
    multiply_rows,
    tile_bound,
)
from emergence_kernels.permutation import Permutation


class ActivationGradient(NamedTuple):
    """What one pass over dA' leaves; a part that was not asked for is None."""

    dpre_SP: Tensor | None
    """(S, P) gradient of the pre-activations."""
    db1_MP: Tensor | None
    """(M, P) fp32: every row tile's share of the gradient of b1, see `sum_of_tiles`."""
    scaled_act_SF: Tensor | None
    """(S, F) activations times the weight of their row."""
    dscale_NS: Tensor | None
    """(N, S) fp32: every column tile's share of `<dA', A>`."""


@triton.jit
def _through_activation(
    dact,  # (BLOCK_M, columns) fp32: a part of dA'
    pre_ptr,  # (S, P) pre-activations
    dpre_ptr,  # (S, P) out, written if WANT_PRE
    db1_ptr,  # (M, P) fp32 out, written if WANT_BIAS
    scaled_act_ptr,  # (S, F) out, written if WANT_ACT
    scale,  # (BLOCK_M,) fp32: the routing weight of every row
    tile_m,
    row,  # (BLOCK_M,) sorted rows, those from `end` on are another expert's
    end,
    first_column,  # of F
    F: tl.constexpr,
    GATED: tl.constexpr,
    WANT_PRE: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    WANT_ACT: tl.constexpr,
    PART: tl.constexpr,
):
    """Write the gradients and activations of the columns; `<dA', A>` of every row, (BLOCK_M,) fp32.

    More than PART elements are halved until they are few enough for the registers.
    """
    COLUMNS: tl.constexpr = dact.shape[1]
    if dact.shape[0] * COLUMNS > PART:
        left, right = halves(dact)
        share = _through_activation(
            left, pre_ptr, dpre_ptr, db1_ptr, scaled_act_ptr, scale, tile_m, row, end, first_column,
            F, GATED, WANT_PRE, WANT_BIAS, WANT_ACT, PART,
        )  # fmt: skip
        return share + _through_activation(
            right, pre_ptr, dpre_ptr, db1_ptr, scaled_act_ptr, scale, tile_m, row, end,
            first_column + COLUMNS // 2, F, GATED, WANT_PRE, WANT_BIAS, WANT_ACT, PART,
        )  # fmt: skip
    P: tl.constexpr = 2 * F if GATED else F
    column = first_column + tl.arange(0, COLUMNS)
    inside = (row < end)[:, None] & (column < F)[None, :]
    wide_row = row.to(tl.int64)[:, None]
    pre_offsets = wide_row * P + column[None, :]
    pre = tl.load(pre_ptr + pre_offsets, mask=inside, other=0.0).to(tl.float32)
    # rows and columns outside hold other rows' numbers, which may be infinite
    dact = tl.where(inside, dact, 0.0)
    if GATED:
        up = tl.load(pre_ptr + pre_offsets + F, mask=inside, other=0.0).to(tl.float32)
        gate, slope = silu(pre)
        act = gate * up
        slope = slope * up
    else:
        act, slope = gelu_tanh(pre)
    share = tl.sum(dact * act, 1)
    if WANT_ACT:
        rounded = (act * scale[:, None]).to(scaled_act_ptr.dtype.element_ty)
        tl.store(scaled_act_ptr + wide_row * F + column[None, :], rounded, mask=inside)
    if WANT_PRE:
        dact *= scale[:, None]
        dpre = dact * slope
        tl.store(dpre_ptr + pre_offsets, dpre.to(dpre_ptr.dtype.element_ty), mask=inside)
        if WANT_BIAS:
            db1_ptrs = db1_ptr + tile_m.to(tl.int64) * P + column
            tl.store(db1_ptrs, tl.sum(dpre, 0), mask=column < F)
        if GATED:
            dup = dact * gate
            dup_ptrs = dpre_ptr + pre_offsets + F
            tl.store(dup_ptrs, dup.to(dpre_ptr.dtype.element_ty), mask=inside)
            if WANT_BIAS:
                db1_ptrs = db1_ptr + tile_m.to(tl.int64) * P + F + column
                tl.store(db1_ptrs, tl.sum(dup, 0), mask=column < F)
    return share


@triton.jit
def _activation_gradient_bwd_kernel(
    dy_ptr,  # (T, H) gradient of the output, rows STRIDE_DY apart
    perm_ptr,  # (S,) int64: the slot t*K + k of every sorted row
    weights_ptr,  # (S,) routing weights by slot
    expert_offsets_ptr,  # (E+1,) int32: first sorted row of every expert
    w2_ptr,  # (E, F, H) contiguous, its descriptor if TMA
    pre_ptr,  # (S, P) pre-activations
    dpre_ptr,  # (S, P) out, written if WANT_PRE
    db1_ptr,  # (M, P) fp32 out, written if WANT_BIAS
    scaled_act_ptr,  # (S, F) out, written if WANT_ACT
    dscale_ptr,  # (N, S) fp32 out, written if WANT_SCALE
    num_rows,
    E: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    STRIDE_DY: tl.constexpr,
    GATED: tl.constexpr,
    WANT_PRE: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    WANT_ACT: tl.constexpr,
    WANT_SCALE: tl.constexpr,
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
    start_E, end_E, tiles_E = expert_tiles(expert_offsets_ptr, E, E_PAD, BLOCK_M)
    tiles_m = tl.max(tiles_E, 0)
    tiles_n: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = grouped_order(tile, tiles_m, tiles_n, GROUP_M)
        expert, first, end = locate_tile(tile_m, start_E, end_E, tiles_E, E_PAD, BLOCK_M)
        row = first + tl.arange(0, BLOCK_M)
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        slot = tl.load(perm_ptr + row, mask=row < end, other=0)
        if TMA:
            dact = multiply_described(
                dy_ptr, slot // K * STRIDE_DY, first, w2_ptr, expert, tile_n * BLOCK_N, H, True,
                True, BLOCK_N, BLOCK_K, PRECISION, False,
            )  # fmt: skip
        else:
            dact = multiply_rows(
                dy_ptr, slot // K * STRIDE_DY, w2_ptr + expert * (F * H), column % F, H, 1, H,
                BLOCK_K, PRECISION,
            )  # fmt: skip
        scale = tl.load(weights_ptr + slot, mask=row < end, other=0.0).to(tl.float32)
        share = _through_activation(
            dact, pre_ptr, dpre_ptr, db1_ptr, scaled_act_ptr, scale, tile_m, row, end,
            tile_n * BLOCK_N, F, GATED, WANT_PRE, WANT_BIAS, WANT_ACT, PART,
        )  # fmt: skip
        if WANT_SCALE:
            dscale_ptrs = dscale_ptr + tile_n.to(tl.int64) * num_rows + row
            tl.store(dscale_ptrs, share, mask=row < end)


def activation_gradient(
    dy_TH: Tensor,
    weights_TK: Tensor,
    w2_EFH: Tensor,
    pre_SP: Tensor,
    permutation: Permutation,
    activation: Activation,
    config: GemmConfig,
    precision: str,
    *,
    want_pre: bool,
    want_bias: bool,
    want_act: bool,
    want_scale: bool,
) -> ActivationGradient:
    """The gradients that pass through the activations, and what other gradients need of them.

    `dy_TH` (T, H) has contiguous rows, `weights_TK` (T, K) is contiguous. `want_bias` needs
    `want_pre`.
    """
    num_experts, width, hidden = w2_EFH.shape
    num_rows, pre_width = pre_SP.shape
    tiles_m = tile_bound(num_rows, num_experts, config.block_m)
    tiles_n = cdiv(width, config.block_n)
    result = ActivationGradient(
        torch.empty_like(pre_SP) if want_pre else None,
        pre_SP.new_empty(tiles_m, pre_width, dtype=torch.float32) if want_bias else None,
        pre_SP.new_empty(num_rows, width) if want_act else None,
        pre_SP.new_empty(tiles_n, num_rows, dtype=torch.float32) if want_scale else None,
    )
    tma = can_describe(config, w2_EFH)
    launch(
        _activation_gradient_bwd_kernel,
        (config.programs(tiles_m * tiles_n, pre_SP.device),),
        dy_TH,
        permutation.perm,
        weights_TK,
        permutation.expert_offsets,
        describe_weight(w2_EFH, config, transposed=True) if tma else w2_EFH,
        pre_SP,
        *result,
        num_rows,
        E=num_experts,
        H=hidden,
        F=width,
        K=weights_TK.shape[1],
        STRIDE_DY=dy_TH.stride(0),
        GATED=activation == "swiglu",
        WANT_PRE=want_pre,
        WANT_BIAS=want_bias,
        WANT_ACT=want_act,
        WANT_SCALE=want_scale,
        # 4 or 8 a thread: every target has the registers
        PART=(128 if activation == "swiglu" else 256) * config.warps,
        PRECISION=precision,
        TMA=tma,
        E_PAD=next_power_of_2(num_experts),
        **config.options(),
    )
    return result

"""Backward through the activation, from the gradient of its result.

With A = act(pre), s the weight of a sorted row, r its token and dA' = dy[r] @ w2[e].T, one pass
over dA' and pre gives the gradient of the pre-activation `s * dA' * act'(pre)`, the scaled
activation `s * A` that the weight gradient needs, every tile's share of `<dA', A>` (the gradient of
s, arXiv 2512.14080) and of the gradient of b1. A is recomputed from the pre-activation.

It is a kernel of its own and not the product's epilogue, because there its registers leave room for
one block a multiprocessor only, and its arithmetic and the product's wait for each other.

Letters: F expert width, P pre-activation width (F, or 2F for SwiGLU), E experts, S routed rows
sorted by expert, M row tiles, N column tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import Activation
from ..permutation import Permutation
from .activation_functions import gelu_tanh, silu
from .launch import cdiv, launch, next_power_of_2
from .tiles import expert_tiles, locate_tile, tile_bound

ROWS_PER_TILE = 64
_COLUMNS_PER_TILE = 32
_WARPS = 2
"""With the tile, about the fastest of twelve on an H200: small blocks keep more loads in flight."""


class ActivationGradient(NamedTuple):
    """What one pass over dA' leaves; a part that was not asked for is None."""

    dpre_SP: Tensor | None
    """(S, P) gradient of the pre-activations."""
    db1_MP: Tensor | None
    """(M, P) fp32: every row tile's share of the gradient of b1, see `sums`."""
    scaled_act_SF: Tensor | None
    """(S, F) activations times the weight of their row."""
    dscale_NS: Tensor | None
    """(N, S) fp32: every column tile's share of `<dA', A>`."""


@triton.jit
def _activation_gradient_bwd_kernel(
    dact_ptr,  # (S, F) dA'
    pre_ptr,  # (S, P) pre-activations
    perm_ptr,  # (S,) int64: the slot t*K + k of every sorted row
    weights_ptr,  # (S,) routing weights by slot
    expert_offsets_ptr,  # (E+1,) int32: first sorted row of every expert
    dpre_ptr,  # (S, P) out, written if WANT_PRE; may be dA' itself unless GATED
    db1_ptr,  # (M, P) fp32 out, written if WANT_BIAS
    scaled_act_ptr,  # (S, F) out, written if WANT_ACT
    dscale_ptr,  # (N, S) fp32 out, written if WANT_SCALE
    num_rows,
    E: tl.constexpr,
    F: tl.constexpr,
    GATED: tl.constexpr,
    WANT_PRE: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    WANT_ACT: tl.constexpr,
    WANT_SCALE: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (column tiles of the first row tile, of the second, up to the most there can be,)."""
    P: tl.constexpr = 2 * F if GATED else F
    start_E, end_E, tiles_E = expert_tiles(expert_offsets_ptr, E, E_PAD, BLOCK_M)
    tiles_n: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    tile_n = tl.program_id(0) % tiles_n
    tile_m = tl.program_id(0) // tiles_n
    if tile_m < tl.max(tiles_E, 0):
        _, first, end = locate_tile(tile_m, start_E, end_E, tiles_E, E_PAD, BLOCK_M)
        row = first + tl.arange(0, BLOCK_M)
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (row < end)[:, None] & (column < F)[None, :]
        wide_row = row.to(tl.int64)[:, None]
        offsets = wide_row * F + column[None, :]
        pre_offsets = wide_row * P + column[None, :]
        slot = tl.load(perm_ptr + row, mask=row < end, other=0)
        scale = tl.load(weights_ptr + slot, mask=row < end, other=0.0).to(tl.float32)
        dact = tl.load(dact_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        pre = tl.load(pre_ptr + pre_offsets, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up = tl.load(pre_ptr + pre_offsets + F, mask=inside, other=0.0).to(tl.float32)
            gate, slope = silu(pre)
            act = gate * up
            slope = slope * up
        else:
            act, slope = gelu_tanh(pre)
        if WANT_SCALE:
            dscale_ptrs = dscale_ptr + tile_n.to(tl.int64) * num_rows + row
            tl.store(dscale_ptrs, tl.sum(dact * act, 1), mask=row < end)
        if WANT_ACT:
            rounded = (act * scale[:, None]).to(scaled_act_ptr.dtype.element_ty)
            tl.store(scaled_act_ptr + offsets, rounded, mask=inside)
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


def activation_gradient(
    dact_SF: Tensor,
    pre_SP: Tensor,
    weights_TK: Tensor,
    permutation: Permutation,
    activation: Activation,
    *,
    want_pre: bool,
    want_bias: bool,
    want_act: bool,
    want_scale: bool,
) -> ActivationGradient:
    """The gradients that pass through the activations, and what other gradients need of them.

    All tensors are contiguous. `want_bias` needs `want_pre`. Unless the activation is gated,
    `dact_SF` is overwritten: `dpre_SP` takes its memory.
    """
    num_rows, width = dact_SF.shape
    gated = activation == "swiglu"
    num_experts = len(permutation.expert_offsets) - 1
    tiles_m = tile_bound(num_rows, num_experts, ROWS_PER_TILE)
    tiles_n = cdiv(width, _COLUMNS_PER_TILE)
    in_place = dact_SF if not gated else torch.empty_like(pre_SP)
    result = ActivationGradient(
        in_place if want_pre else None,
        pre_SP.new_empty(tiles_m, pre_SP.shape[1], dtype=torch.float32) if want_bias else None,
        torch.empty_like(dact_SF) if want_act else None,
        pre_SP.new_empty(tiles_n, num_rows, dtype=torch.float32) if want_scale else None,
    )
    launch(
        _activation_gradient_bwd_kernel,
        (tiles_n * tiles_m,),
        dact_SF,
        pre_SP,
        permutation.perm,
        weights_TK,
        permutation.expert_offsets,
        *result,
        num_rows,
        E=num_experts,
        F=width,
        GATED=gated,
        WANT_PRE=want_pre,
        WANT_BIAS=want_bias,
        WANT_ACT=want_act,
        WANT_SCALE=want_scale,
        E_PAD=next_power_of_2(num_experts),
        BLOCK_M=ROWS_PER_TILE,
        BLOCK_N=_COLUMNS_PER_TILE,
        num_warps=_WARPS,
    )
    return result

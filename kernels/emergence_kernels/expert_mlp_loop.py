"""The expert MLP in plain PyTorch, one product per expert: for CPUs, fp64, and without Triton.

Letters: T tokens, H model width, F expert width, P pre-activation width (F, or 2F for SwiGLU),
E experts, K experts per token, S = T*K rows sorted by expert.
"""

import torch
from torch import Tensor

from .activations import Activation, activate, activate_backward
from .grouped_gemm import (
    as_stored,
    grouped_gemm,
    grouped_gemm_dw,
    grouped_gemm_dx,
    grouped_sum,
    rows_of_experts,
)
from .permutation import Permutation


def forward(
    x_TH: Tensor,
    weights_TK: Tensor,
    w1_EHP: Tensor,
    b1_EP: Tensor | None,
    w2_EFH: Tensor,
    b2_EH: Tensor | None,
    permutation: Permutation,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """Output (T, H) and the pre-activations (S, P) that the backward pass needs."""
    offsets = permutation.expert_offsets
    pre_SP = grouped_gemm(x_TH.index_select(0, permutation.token_idx), w1_EHP, offsets, b1_EP)
    out_SH = grouped_gemm(activate(pre_SP, activation), w2_EFH, offsets, b2_EH)
    return _combine(out_SH, permutation.inv_perm, weights_TK.shape[1], weights_TK), pre_SP


def _combine(rows_SH: Tensor, inv_perm_S: Tensor, top_k: int, weights_TK: Tensor | None) -> Tensor:
    """Gather the K rows of every token and sum them in at least fp32: (T, H)."""
    rows_TKH = rows_SH.index_select(0, inv_perm_S).view(-1, top_k, rows_SH.shape[1])
    wide = torch.promote_types(rows_SH.dtype, torch.float32)
    if weights_TK is not None and not _all_ones(weights_TK):
        weights_TK1 = weights_TK.to(wide).unsqueeze(-1)
        # the gathered rows are a copy already: in place where the dtype allows
        rows_TKH = rows_TKH.mul_(weights_TK1) if rows_SH.dtype == wide else rows_TKH * weights_TK1
    if top_k > 1:
        return rows_TKH.sum(dim=1, dtype=wide).to(rows_SH.dtype)
    return rows_TKH[:, 0].to(rows_SH.dtype)


def _all_ones(weights_TK: Tensor) -> bool:
    """Whether scaling changes nothing, as with straight-through top-1; asked where it costs no
    synchronisation only."""
    return not weights_TK.is_cuda and bool((weights_TK == 1).all())


def backward(
    dy_TH: Tensor,
    x_TH: Tensor,
    weights_TK: Tensor,
    w1_EHP: Tensor,
    w2_EFH: Tensor,
    b2_EH: Tensor | None,
    pre_SP: Tensor,
    permutation: Permutation,
    activation: Activation,
    dtype: torch.dtype,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, the routing weights, w1, b1, w2 and b2, where `wanted` says so.

    `dtype` is that of the gradients of w1, b1, w2 and b2.
    """
    offsets, token_idx_S = permutation.expert_offsets, permutation.token_idx
    want_x, want_weights, want_w1, want_b1, want_w2, want_b2 = wanted
    want_up = want_x or want_w1 or want_b1
    wide = torch.promote_types(pre_SP.dtype, torch.float32)
    dx = dweights = dw1 = db1 = dw2 = db2 = None

    scale_S1 = None
    if not _all_ones(weights_TK):
        scale_S1 = weights_TK.reshape(-1, 1).index_select(0, permutation.perm)
    act_SF = activate(pre_SP, activation)
    dy_SH = dy_TH.index_select(0, token_idx_S)
    if want_weights or want_up:
        dact_SF = grouped_gemm_dx(dy_SH, w2_EFH, offsets)
    if want_weights:
        dscale_S = _row_products(dact_SF, act_SF, wide)
        if b2_EH is not None:
            bias_SH = rows_of_experts(b2_EH, offsets, len(dy_SH))
            dscale_S += _row_products(dy_SH, bias_SH, wide)
        row_S = torch.arange(len(dscale_S), device=dscale_S.device)
        dscale_S = dscale_S.masked_fill_(row_S >= offsets[-1], 0)  # rows without an expert
        dweights = dscale_S.index_select(0, permutation.inv_perm).view_as(weights_TK)
        dweights = dweights.to(weights_TK.dtype)
    if want_w2 or want_b2:
        # the scale belongs to either factor of dw2; on dy it serves db2 as well
        _scale_rows(dy_SH, scale_S1)
        if want_w2:
            transposed = as_stored(w2_EFH)[1]
            dw2 = grouped_gemm_dw(act_SF, dy_SH, offsets, dtype, transposed=transposed)
        db2 = grouped_sum(dy_SH, offsets, dtype) if want_b2 else None
    del act_SF, dy_SH
    if want_up:
        _scale_rows(dact_SF, scale_S1)
        dpre_SP = activate_backward(dact_SF, pre_SP, activation)
        del dact_SF
        if want_w1:
            x_SH, transposed = x_TH.index_select(0, token_idx_S), as_stored(w1_EHP)[1]
            dw1 = grouped_gemm_dw(x_SH, dpre_SP, offsets, dtype, transposed=transposed)
        db1 = grouped_sum(dpre_SP, offsets, dtype) if want_b1 else None
        if want_x:
            dx_SH = grouped_gemm_dx(dpre_SP, w1_EHP, offsets)
            dx = _combine(dx_SH, permutation.inv_perm, weights_TK.shape[1], None)
    return dx, dweights, dw1, db1, dw2, db2


_CHUNK = 128 * 1024
"""Elements that wider intermediate results may have at a time, so that they stay in the cache."""


def _row_products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """(S,) sum over the columns of a * b, in `dtype`."""
    rows = max(_CHUNK // max(a.shape[1], 1), 1)
    products_S = a.new_empty(len(a), dtype=dtype)
    for part, a_part, b_part in zip(
        products_S.split(rows), a.split(rows), b.split(rows), strict=True
    ):
        torch.sum(a_part.to(dtype) * b_part, dim=1, out=part)
    return products_S


def _scale_rows(rows: Tensor, scale_S1: Tensor | None) -> None:
    """Multiply every row by its scale in place: in at least fp32, rounded once."""
    if scale_S1 is None:
        return
    step = max(_CHUNK // max(rows.shape[1], 1), 1)
    for part, scale in zip(rows.split(step), scale_S1.split(step), strict=True):
        part.copy_(part * scale)

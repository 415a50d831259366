"""The expert MLP in plain PyTorch, batch by batch: for CPUs, fp64, and without Triton.

A batch of experts goes through the whole MLP before the next one begins, so that what lies between
two products stays in the cache, and only the pre-activations and the rows of the output are whole.

Letters: T tokens, H model width, F expert width, P pre-activation width (F, or 2F for SwiGLU),
E experts, K experts per token, S = T*K rows sorted by expert; of a batch, B experts, R rows of each
and Q = B*R rows.
"""

import torch
from torch import Tensor

from .activations import Activation, activate_backward, activate_in_cache
from .batches import Batch, BatchPlan, Layout, default_plan
from .grouped_gemm import as_stored, empty_gradient
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
    plan: str = "",
) -> tuple[Tensor, Tensor]:
    """Output (T, H) and the pre-activations (S, P) that the backward pass needs."""
    dtype, wide = _product_dtype(x_TH), torch.promote_types(x_TH.dtype, torch.float32)
    layout = _layout(x_TH, w1_EHP, permutation, plan)
    weights = None if _all_ones(weights_TK) else weights_TK.to(wide)
    pre_SP = x_TH.new_empty(len(permutation.perm), w1_EHP.shape[2])
    pre_SP[layout.num_used :] = 0
    # weighted and added up before they are rounded
    out_dtype = x_TH.dtype if weights is None else wide
    out_QH = x_TH.new_empty(layout.num_rows + 1, x_TH.shape[1], dtype=out_dtype)
    out_QH[-1] = 0
    x_place, pre_place = layout.scratch(x_TH, x_TH.shape[1]), layout.scratch(x_TH, pre_SP.shape[1])
    for batch in layout.batches:
        own, rows, experts = batch.own, batch.rows, batch.experts
        x_BRH = batch.view(_gather(x_TH, layout.tokens_Q[rows], x_place).to(dtype))
        pre_QP = pre_place[: rows.stop - rows.start] if batch.is_padded else pre_SP[own]
        bias = None if b1_EP is None else b1_EP[experts].unsqueeze(1).to(dtype)
        _product(x_BRH, w1_EHP[experts].to(dtype), batch.view(pre_QP), bias)
        if batch.is_padded:
            places = layout.places_S[own] - batch.start
            torch.index_select(pre_QP, 0, places, out=pre_SP[own])
        act_BRF = batch.view(activate_in_cache(pre_QP.to(wide), activation).to(dtype))
        bias = None if b2_EH is None else b2_EH[experts].unsqueeze(1).to(dtype)
        _product(act_BRF, w2_EFH[experts].to(dtype), batch.view(out_QH[rows]), bias)
    y_TH = layout.combine(out_QH, permutation.inv_perm, weights_TK.shape[1], weights)
    return y_TH.to(x_TH.dtype), pre_SP


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
    wanted: tuple[bool, ...],
    plan: str = "",
) -> tuple[Tensor | None, ...]:
    """Gradients of x, the routing weights, w1, b1, w2 and b2, where `wanted` says so."""
    want_x, want_weights, want_w1, want_b1, want_w2, want_b2 = wanted
    want_up = want_x or want_w1 or want_b1
    dtype, wide = _product_dtype(x_TH), torch.promote_types(x_TH.dtype, torch.float32)
    layout = _layout(x_TH, w1_EHP, permutation, plan)
    scale_Q1 = None
    if layout.is_padded or not _all_ones(weights_TK):
        scale_Q1 = layout.scales(weights_TK, permutation.perm)
    num_experts, hidden = w2_EFH.shape[0], w2_EFH.shape[2]
    dx_QH = x_TH.new_empty(layout.num_rows + 1, hidden) if want_x else None
    dscale_Q = x_TH.new_zeros(layout.num_rows + 1, dtype=wide) if want_weights else None
    dw1 = empty_gradient(w1_EHP) if want_w1 else None
    dw2 = empty_gradient(w2_EFH) if want_w2 else None
    db1 = w1_EHP.new_empty(num_experts, w1_EHP.shape[2]) if want_b1 else None
    db2 = w2_EFH.new_empty(num_experts, hidden) if want_b2 else None
    x_place, dy_place = layout.scratch(x_TH, hidden), layout.scratch(x_TH, hidden)
    pre_place = layout.scratch(x_TH, pre_SP.shape[1])
    dact_place = layout.scratch(x_TH, w2_EFH.shape[1])
    for batch in layout.batches:
        own, rows, experts = batch.own, batch.rows, batch.experts
        tokens_Q = layout.tokens_Q[rows]
        scale_q1 = None if scale_Q1 is None else scale_Q1[rows]
        dy_BRH = batch.view(_gather(dy_TH, tokens_Q, dy_place).to(dtype))
        wide_dy_BRH = dy_BRH.to(wide)
        pre_QP = pre_SP[own]
        if batch.is_padded:
            pre_QP = _gather(pre_SP, layout.rows_Q[rows], pre_place)
        pre_QP = pre_QP.to(wide)
        if want_up or want_weights:
            dact_QF = dact_place[: rows.stop - rows.start]
            _product(dy_BRH, w2_EFH[experts].mT.to(dtype), batch.view(dact_QF))
            dact_QF = dact_QF.to(wide)
            act_QF, dpre_QP = activate_backward(dact_QF, pre_QP, activation)
        else:
            act_QF = activate_in_cache(pre_QP, activation)
        if dscale_Q is not None:
            torch.sum(dact_QF.mul_(act_QF), dim=1, out=dscale_Q[rows])
            if b2_EH is not None:
                b2_BH1 = b2_EH[experts].unsqueeze(2).to(wide)
                batch.view(dscale_Q[rows]).baddbmm_(wide_dy_BRH, b2_BH1)
        if dw2 is not None:
            if scale_q1 is not None:
                act_QF.mul_(scale_q1)
            _weight_gradient(batch.view(act_QF.to(dtype)), dy_BRH, dw2, batch)
        if db2 is not None:
            if scale_q1 is not None:
                wide_dy_BRH = wide_dy_BRH * batch.view(scale_q1)
            db2[experts] = wide_dy_BRH.sum(1)
        if not want_up:
            continue
        if scale_q1 is not None:
            dpre_QP.mul_(scale_q1)
        if db1 is not None:
            db1[experts] = batch.view(dpre_QP).sum(1)
        dpre_BRP = batch.view(dpre_QP.to(dtype))
        if dw1 is not None:
            x_BRH = batch.view(_gather(x_TH, tokens_Q, x_place).to(dtype))
            _weight_gradient(x_BRH, dpre_BRP, dw1, batch)
        if dx_QH is not None:
            _product(dpre_BRP, w1_EHP[experts].mT.to(dtype), batch.view(dx_QH[rows]))
    for gradient in (dw1, db1, dw2, db2):
        if gradient is not None and layout.without_rows:
            gradient[layout.without_rows] = 0
    dx = dweights = None
    if dx_QH is not None:
        dx_QH[-1] = 0
        dx = layout.combine(dx_QH, permutation.inv_perm, weights_TK.shape[1])
    if dscale_Q is not None:
        places_S = layout.places_S.index_select(0, permutation.inv_perm)
        dweights = dscale_Q.index_select(0, places_S).view_as(weights_TK).to(weights_TK.dtype)
    return dx, dweights, dw1, db1, dw2, db2


def _layout(x_TH: Tensor, w1_EHP: Tensor, permutation: Permutation, plan: str) -> Layout:
    chosen = BatchPlan.decode(plan) if plan else default_plan(x_TH.dtype, x_TH.device)
    _, hidden, pre_width = w1_EHP.shape
    return Layout(permutation, max(hidden, pre_width), 2 * hidden * pre_width, chosen)


def _all_ones(weights_TK: Tensor) -> bool:
    """Whether scaling changes nothing, as with straight-through top-1; asked where it costs no
    synchronisation only."""
    return not weights_TK.is_cuda and bool((weights_TK == 1).all())


def _product_dtype(x_TH: Tensor) -> torch.dtype:
    """That of the factors: fp32 for 16 bits on a CPU that has no instructions for them."""
    if x_TH.device.type == "cpu" and torch.backends.mkldnn.is_available():
        knows = {
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        }.get(x_TH.dtype)
        if knows is not None and not knows():
            return torch.float32
    return x_TH.dtype


def _gather(rows_TN: Tensor, tokens_Q: Tensor, place: Tensor) -> Tensor:
    """(Q, N), in memory that the batch before has used."""
    return torch.index_select(rows_TN, 0, tokens_Q, out=place[: len(tokens_Q)])


def _product(a_BRI: Tensor, w_BIO: Tensor, out_BRO: Tensor, bias: Tensor | None = None) -> None:
    """`out = a @ w + bias`, added up in at least fp32 and rounded once."""
    place = out_BRO if out_BRO.dtype == a_BRI.dtype and out_BRO.is_contiguous() else None
    if bias is None:
        made = torch.bmm(a_BRI, w_BIO, out=place)
    else:
        made = torch.baddbmm(bias, a_BRI, w_BIO, out=place)
    if place is None:
        out_BRO.copy_(made)


def _weight_gradient(a_BRI: Tensor, b_BRO: Tensor, dw_EIO: Tensor, batch: Batch) -> None:
    """`dw[experts] = a.mT @ b`, as it is stored."""
    stored, transposed = as_stored(dw_EIO)
    first, second = (b_BRO, a_BRI) if transposed else (a_BRI, b_BRO)
    _product(first.mT, second, stored[batch.experts])

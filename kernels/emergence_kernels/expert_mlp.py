"""The experts of a whole layer as one differentiable operator over rows sorted by expert.

Letters: T tokens, H model width, F expert width, P pre-activation width (F, or 2F for SwiGLU),
E experts, K experts per token, S = T*K rows sorted by expert.

With r the token and s the weight of a sorted row, A = act(pre), pre = x[r] @ w1[e] + b1[e]:

    y[t] = sum over k of s * (A @ w2[e] + b2[e])

Only x, pre and the routing are kept for backward. The gradient of s is `<dA', A> + <dy[r], b2[e]>`
with dA' = dy[r] @ w2[e].T, so the down projection's output is never stored (arXiv 2512.14080).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emergence_kernels.activations import Activation, activate, activate_backward
from emergence_kernels.grouped_gemm import (
    grouped_gemm,
    grouped_gemm_dw,
    grouped_gemm_dx,
    grouped_sum,
    rows_of_experts,
)
from emergence_kernels.permutation import Permutation


def _combine(rows_SH: Tensor, inv_perm_S: Tensor, top_k: int, weights_TK: Tensor | None) -> Tensor:
    """Gather the K rows of every token and sum them in at least fp32: (T, H)."""
    rows_TKH = rows_SH[inv_perm_S].view(-1, top_k, rows_SH.shape[1])
    if top_k == 1 and weights_TK is None:
        return rows_TKH[:, 0]
    wide = torch.promote_types(rows_SH.dtype, torch.float32)
    if weights_TK is not None:
        rows_TKH = rows_TKH * weights_TK.to(wide).unsqueeze(-1)
    return rows_TKH.sum(dim=1, dtype=wide).to(rows_SH.dtype)


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weights_TK: Tensor,
        w1_EHP: Tensor,
        b1_EP: Tensor | None,
        w2_EFH: Tensor,
        b2_EH: Tensor | None,
        permutation: Permutation,
        activation: Activation,
    ) -> Tensor:
        offsets = permutation.expert_offsets
        pre_SP = grouped_gemm(x_TH[permutation.token_idx], w1_EHP, offsets, b1_EP)
        out_SH = grouped_gemm(activate(pre_SP, activation), w2_EFH, offsets, b2_EH)
        ctx.save_for_backward(x_TH, weights_TK, w1_EHP, w2_EFH, b2_EH, pre_SP, *permutation)
        ctx.activation = activation
        return _combine(out_SH, permutation.inv_perm, weights_TK.shape[1], weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, weights_TK, w1_EHP, w2_EFH, b2_EH, pre_SP, *saved = ctx.saved_tensors
        permutation = Permutation(*saved)
        offsets, token_idx_S = permutation.expert_offsets, permutation.token_idx
        need_x, need_weights, need_w1, need_b1, need_w2, need_b2 = ctx.needs_input_grad[:6]
        wide = torch.promote_types(pre_SP.dtype, torch.float32)
        dx = dweights = dw1 = db1 = dw2 = db2 = None

        scale_S1 = weights_TK.reshape(-1)[permutation.perm].unsqueeze(1)
        act_SF = activate(pre_SP, ctx.activation)
        dy_SH = dy_TH[token_idx_S]
        need_up = need_x or need_w1 or need_b1
        if need_weights or need_up:
            dact_SF = grouped_gemm_dx(dy_SH, w2_EFH, offsets)
        if need_weights:
            dscale_S = (dact_SF * act_SF).sum(dim=1, dtype=wide)
            if b2_EH is not None:
                bias_SH = rows_of_experts(b2_EH, offsets, len(dy_SH))
                dscale_S = dscale_S + (dy_SH * bias_SH).sum(dim=1, dtype=wide)
            dweights = dscale_S[permutation.inv_perm].view_as(weights_TK).to(weights_TK.dtype)
        if need_w2 or need_b2:
            # the scale belongs to either factor of dw2; on dy it serves db2 as well
            scaled_dy_SH = (dy_SH * scale_S1).to(dy_SH.dtype)
            dw2 = grouped_gemm_dw(act_SF, scaled_dy_SH, offsets) if need_w2 else None
            db2 = grouped_sum(scaled_dy_SH, offsets) if need_b2 else None
            del scaled_dy_SH
        del act_SF, dy_SH
        if need_up:
            dact_SF = (dact_SF * scale_S1).to(dact_SF.dtype)
            dpre_SP = activate_backward(dact_SF, pre_SP, ctx.activation)
            del dact_SF
            dw1 = grouped_gemm_dw(x_TH[token_idx_S], dpre_SP, offsets) if need_w1 else None
            db1 = grouped_sum(dpre_SP, offsets) if need_b1 else None
            if need_x:
                dx_SH = grouped_gemm_dx(dpre_SP, w1_EHP, offsets)
                dx = _combine(dx_SH, permutation.inv_perm, weights_TK.shape[1], None)
        return dx, dweights, dw1, db1, dw2, db2, None, None


def expert_mlp(
    x_TH: Tensor,
    topk_weights_TK: Tensor,
    w1_EHP: Tensor,
    b1_EP: Tensor | None,
    w2_EFH: Tensor,
    b2_EH: Tensor | None,
    permutation: Permutation,
    activation: Activation,
) -> Tensor:
    """Weighted sum of every token's K experts: (T, H).

    Args:
        x_TH: (T, H) tokens.
        topk_weights_TK: (T, K) routing weights, at least fp32.
        w1_EHP, b1_EP: up projection (E, H, P) and its bias (E, P) or None.
        w2_EFH, b2_EH: down projection (E, F, H) and its bias (E, H) or None.
        permutation: from `sort_by_expert` of the (T, K) chosen experts.
        activation: "gelu_tanh" (P = F) or "swiglu" (P = 2F, gate then up).

    Under autocast everything but the routing weights is cast to the autocast dtype first, unless
    it is fp64, as autocast does for a matrix product. Differentiable once in every floating input.
    """
    if x_TH.dtype != torch.float64 and torch.is_autocast_enabled(x_TH.device.type):
        dtype = torch.get_autocast_dtype(x_TH.device.type)
        x_TH, w1_EHP, w2_EFH = x_TH.to(dtype), w1_EHP.to(dtype), w2_EFH.to(dtype)
        b1_EP = None if b1_EP is None else b1_EP.to(dtype)
        b2_EH = None if b2_EH is None else b2_EH.to(dtype)
    with torch.autocast(x_TH.device.type, enabled=False):
        result: Tensor = _ExpertMLP.apply(
            x_TH, topk_weights_TK, w1_EHP, b1_EP, w2_EFH, b2_EH, permutation, activation
        )
    return result

"""Forward and backward of the expert MLP from the kernels.

Letters: T tokens, H model width, F expert width, P pre-activation width (F, or 2F for SwiGLU),
E experts, K experts per token, S = T*K routed rows sorted by expert.
"""

import torch
from torch import Tensor

from ..activations import Activation
from ..grouped_gemm import as_stored
from ..permutation import Permutation
from .activation_gradient import activation_gradient
from .combine import combine, gather
from .defaults import default_plan, target_of
from .factors import as_factor
from .gemm_config import GemmPlan, rows_bucket
from .launch import matmul_precision, with_contiguous_rows
from .row_product import row_product
from .small_gradients import output_bias_gradient, sums
from .up_projection import up_projection
from .weight_gradient import weight_gradient


def plan_for(
    x_TH: Tensor, w1_EHP: Tensor, permutation: Permutation, activation: Activation, plan: str
) -> GemmPlan:
    """The encoded plan, or for an empty one the defaults for this device, dtype and shape."""
    if plan:
        return GemmPlan.decode(plan)
    return default_plan(
        target_of(x_TH.device),
        x_TH.dtype,
        matmul_precision(x_TH),
        rows_bucket(permutation.perm.numel(), len(w1_EHP)),
        gated=activation == "swiglu",
    )


def forward(
    x_TH: Tensor,
    weights_TK: Tensor,
    w1_EHP: Tensor,
    b1_EP: Tensor | None,
    w2_EFH: Tensor,
    b2_EH: Tensor | None,
    permutation: Permutation,
    activation: Activation,
    plan: GemmPlan,
) -> tuple[Tensor, Tensor]:
    """Output (T, H) and the pre-activations (S, P) that the backward pass needs."""
    precision = matmul_precision(x_TH)
    b1_EP = None if b1_EP is None else b1_EP.contiguous()
    b2_EH = None if b2_EH is None else b2_EH.contiguous()
    offsets = permutation.expert_offsets
    w1, w1_transposed = as_stored(w1_EHP)
    w2, w2_transposed = as_stored(w2_EFH)
    x_SH = gather(with_contiguous_rows(x_TH), permutation.token_idx)
    pre_SP, act_SF = up_projection(
        as_factor(x_SH, precision, in_place=True),
        as_factor(w1, precision),
        b1_EP,
        offsets,
        activation,
        plan.up,
        precision,
        transposed=w1_transposed,
    )
    out_SH = row_product(
        as_factor(act_SF, precision, in_place=True),
        as_factor(w2, precision),
        b2_EH,
        offsets,
        plan.down,
        precision,
        transposed=w2_transposed,
    )
    top_k, weights_TK = weights_TK.shape[1], weights_TK.contiguous()
    return combine(out_SH, permutation.inv_perm, top_k, weights_TK, offsets), pre_SP


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
    plan: GemmPlan,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, the routing weights, w1, b1, w2 and b2, where `wanted` says so.

    `dtype` is that of the gradients of w1, b1, w2 and b2.

    Everything but x, the pre-activations and the routing is computed again or not kept: the
    activation from the pre-activation, the routing weight's gradient as `<dA', A>`.
    """
    precision = matmul_precision(x_TH)
    want_x, want_weights, want_w1, want_b1, want_w2, want_b2 = wanted
    offsets, token_idx_S = permutation.expert_offsets, permutation.token_idx
    weights_TK = weights_TK.contiguous()
    w1, w1_transposed = as_stored(w1_EHP)
    w2, w2_transposed = as_stored(w2_EFH)
    dx = dw1 = dw2 = db2_MH = bias_dscale_NS = None

    dy_SH = gather(with_contiguous_rows(dy_TH), token_idx_S)
    dy_factor = as_factor(dy_SH, precision)
    dact_SF = row_product(
        dy_factor,
        as_factor(w2, precision),
        None,
        offsets,
        plan.activation_grad,
        precision,
        transposed=not w2_transposed,
    )
    through = activation_gradient(
        dact_SF,
        pre_SP,
        weights_TK,
        permutation,
        activation,
        want_pre=want_x or want_w1 or want_b1,
        want_bias=want_b1,
        want_act=want_w2,
        want_scale=want_weights,
    )
    if b2_EH is not None and (want_b2 or want_weights):
        db2_MH, bias_dscale_NS = output_bias_gradient(
            dy_SH, weights_TK, b2_EH.contiguous(), permutation
        )
    db1, db2, dweights = sums(
        through.db1_MP,
        db2_MH if want_b2 else None,
        through.dscale_NS,
        bias_dscale_NS,
        permutation,
        weights_TK,
        dtype,
    )
    if through.scaled_act_SF is not None:
        act_SF = as_factor(through.scaled_act_SF, precision, in_place=True)
        dw2 = weight_gradient(
            act_SF, dy_factor, offsets, plan.weight_grad, precision, dtype, transposed=w2_transposed
        )
    if through.dpre_SP is not None and (want_w1 or want_x):
        dpre_SP = as_factor(through.dpre_SP, precision, in_place=True)
    if want_w1:
        x_SH = gather(with_contiguous_rows(x_TH), token_idx_S)
        x_SH = as_factor(x_SH, precision, in_place=True)
        dw1 = weight_gradient(
            x_SH, dpre_SP, offsets, plan.weight_grad, precision, dtype, transposed=w1_transposed
        )
    if want_x:
        dx_SH = row_product(
            dpre_SP,
            as_factor(w1, precision),
            None,
            offsets,
            plan.input_grad,
            precision,
            transposed=not w1_transposed,
        )
        dx = combine(dx_SH, permutation.inv_perm, weights_TK.shape[1], None, offsets)
    return dx, dweights, dw1, db1, dw2, db2

"""Forward and backward of a linear layer per expert from the kernels.

Letters: S routed rows sorted by expert, E experts, I input width, O output width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..grouped_gemm import as_stored, clear_rest, grouped_sum
from .defaults import default_plan, target_of
from .factors import as_factor
from .gemm_config import GemmPlan, rows_bucket
from .launch import matmul_precision
from .row_product import row_product
from .weight_gradient import weight_gradient


def _plan(x_SI: Tensor, num_experts: int) -> GemmPlan:
    precision, bucket = matmul_precision(x_SI), rows_bucket(len(x_SI), num_experts)
    return default_plan(target_of(x_SI.device), x_SI.dtype, precision, bucket, gated=False)


def forward(
    x_SI: Tensor,
    w_EIO: Tensor,
    b_EO: Tensor | None,
    expert_offsets: Tensor,
    plan: GemmPlan | None = None,
) -> Tensor:
    """`x[rows of e] @ w[e] + b[e]` (S, O); rows without an expert are zero."""
    precision = matmul_precision(x_SI)
    config = (plan or _plan(x_SI, len(w_EIO))).down
    w, transposed = as_stored(w_EIO)
    y_SO = row_product(
        as_factor(x_SI.contiguous(), precision),
        as_factor(w, precision),
        None if b_EO is None else b_EO.contiguous(),
        expert_offsets,
        config,
        precision,
        transposed=transposed,
    )
    return clear_rest(y_SO, expert_offsets[-1])


def backward(
    dy_SO: Tensor,
    x_SI: Tensor,
    w_EIO: Tensor,
    expert_offsets: Tensor,
    dtype: torch.dtype,
    wanted: Sequence[bool],
    plan: GemmPlan | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w and b, where `wanted` says so; those of w and b are in `dtype`."""
    want_x, want_w, want_b = wanted
    precision = matmul_precision(x_SI)
    plan = plan or _plan(x_SI, len(w_EIO))
    dy_SO = dy_SO.contiguous()
    dy_factor = as_factor(dy_SO, precision)
    w, transposed = as_stored(w_EIO)
    dx = dw = None
    if want_x:
        dx = row_product(
            dy_factor,
            as_factor(w, precision),
            None,
            expert_offsets,
            plan.input_grad,
            precision,
            transposed=not transposed,
        )
        dx = clear_rest(dx, expert_offsets[-1])
    if want_w:
        x_factor = as_factor(x_SI.contiguous(), precision)
        dw = weight_gradient(
            x_factor,
            dy_factor,
            expert_offsets,
            plan.weight_grad,
            precision,
            dtype,
            transposed=transposed,
        )
    return dx, dw, grouped_sum(dy_SO, expert_offsets, dtype) if want_b else None

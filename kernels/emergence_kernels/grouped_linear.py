"""A linear layer per expert over sorted rows, as a differentiable operator: for experts whose
activation the fused `expert_mlp` does not have, which then runs between two of these.

Letters: S rows sorted by expert, E experts, I input width, O output width.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .grouped_gemm import (
    as_stored,
    empty_gradient,
    grouped_gemm,
    grouped_gemm_dw,
    grouped_gemm_dx,
    grouped_sum,
)
from .operators import define, kernels_take, require, sizes_of


def _forward(x_SI: Tensor, w_EIO: Tensor, b_EO: Tensor | None, offsets: Tensor) -> Tensor:
    dtype = x_SI.dtype
    b_EO = None if b_EO is None else b_EO.to(dtype)
    if kernels_take(x_SI):
        from .gpu import grouped_linear as kernels

        return kernels.forward(x_SI, w_EIO.to(dtype), b_EO, offsets)
    return grouped_gemm(x_SI, w_EIO, offsets, b_EO)


def _fake_forward(x_SI: Tensor, w_EIO: Tensor, b_EO: Tensor | None, offsets: Tensor) -> Tensor:
    return x_SI.new_empty(x_SI.shape[0], w_EIO.shape[2])


def _gradients(
    dy_SO: Tensor, x_SI: Tensor, w_EIO: Tensor, offsets: Tensor, wanted: list[bool]
) -> list[Tensor]:
    want_x, want_w, want_b = wanted
    kept = w_EIO.dtype
    if kernels_take(x_SI):
        from .gpu import grouped_linear as kernels

        found = kernels.backward(dy_SO, x_SI, w_EIO.to(x_SI.dtype), offsets, kept, wanted)
    else:
        dy_SO = dy_SO.contiguous()
        transposed = as_stored(w_EIO)[1]
        found = (
            grouped_gemm_dx(dy_SO, w_EIO, offsets) if want_x else None,
            grouped_gemm_dw(x_SI, dy_SO, offsets, kept, transposed=transposed) if want_w else None,
            grouped_sum(dy_SO, offsets, kept) if want_b else None,
        )
    return [gradient for gradient in found if gradient is not None]


def _fake_gradients(
    dy_SO: Tensor, x_SI: Tensor, w_EIO: Tensor, offsets: Tensor, wanted: list[bool]
) -> list[Tensor]:
    bias = w_EIO.new_empty(w_EIO.shape[0], w_EIO.shape[2])
    found = (x_SI.new_empty(x_SI.shape), empty_gradient(w_EIO), bias)
    return [gradient for gradient, want in zip(found, wanted, strict=True) if want]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy_SO: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    x_SI, w_EIO, b_EO, offsets = ctx.saved_tensors
    if torch.is_grad_enabled():
        made = _differentiable(x_SI, w_EIO, b_EO, offsets, dy_SO, wanted)
    else:
        made = _grouped_linear_backward(dy_SO, x_SI, w_EIO, offsets, wanted)
    found = iter(made)
    return (*(next(found) if want else None for want in wanted), None)


def _differentiable(
    x_SI: Tensor,
    w_EIO: Tensor,
    b_EO: Tensor | None,
    offsets: Tensor,
    dy_SO: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """The wanted gradients as autograd makes them of the plain twin, to be differentiated again."""
    from . import reference

    # views: one input may depend on another, and these are the partial derivatives
    inputs = [None if t is None else t.view_as(t) for t in (x_SI, w_EIO, b_EO)]
    x, w, b = inputs
    assert x is not None
    assert w is not None
    b = None if b is None else b.to(x.dtype)
    y_SO = reference.grouped_gemm(x, w.to(x.dtype), offsets, b)
    leaves = [t for t, want in zip(inputs, wanted, strict=True) if want and t is not None]
    return torch.autograd.grad(y_SO, leaves, dy_SO, create_graph=True)


def _check(x_SI: Tensor, w_EIO: Tensor, b_EO: Tensor | None, offsets: Tensor) -> None:
    _check_operands("grouped_linear", (("x", "SI"),), (x_SI,), w_EIO, b_EO, offsets)


def _check_gradients(
    dy_SO: Tensor, x_SI: Tensor, w_EIO: Tensor, offsets: Tensor, wanted: list[bool]
) -> None:
    name = "grouped_linear_backward"
    _check_operands(name, (("dy", "SO"), ("x", "SI")), (dy_SO, x_SI), w_EIO, None, offsets)
    require(len(wanted) == 3, name, f"wanted has {len(wanted)} flags, not 3")


def _check_operands(
    name: str,
    specs: tuple[tuple[str, str], ...],
    rows: tuple[Tensor, ...],
    w_EIO: Tensor,
    b_EO: Tensor | None,
    offsets: Tensor,
) -> None:
    specs = (*specs, ("w", "EIO"), ("b", "EO"), ("expert_offsets", "N"))
    sizes = sizes_of(name, specs, (*rows, w_EIO, b_EO, offsets))
    fits = offsets.dtype == torch.int32 and offsets.is_contiguous()
    fits = fits and sizes["N"] == sizes["E"] + 1
    require(fits, name, "expert_offsets is not as sort_by_expert makes it for w's experts")
    same = b_EO is None or b_EO.dtype == w_EIO.dtype
    require(same, name, f"w is {w_EIO.dtype}, b is not")


_grouped_linear = define(
    "grouped_linear(Tensor x, Tensor w, Tensor? b, Tensor expert_offsets) -> Tensor",
    _forward,
    _fake_forward,
    _check,
    (_backward, _setup_context),
)
_grouped_linear_backward = define(
    "grouped_linear_backward(Tensor dy, Tensor x, Tensor w, Tensor expert_offsets, bool[] wanted)"
    " -> Tensor[]",
    _gradients,
    _fake_gradients,
    _check_gradients,
)


def grouped_linear(
    x_SI: Tensor, w_EIO: Tensor, b_EO: Tensor | None, expert_offsets: Tensor
) -> Tensor:
    """`x[rows of e] @ w[e] + b[e]` (S, O) for every expert e.

    Args:
        x_SI: (S, I) rows sorted by expert.
        w_EIO: (E, I, O), or a transposed view of a contiguous (E, O, I); its gradient is alike.
        b_EO: (E, O) or None.
        expert_offsets: (E+1,) int32, as in `Permutation`; rows from its last on become zero.

    Under autocast computed in the autocast dtype, unless the rows are fp64. Weights keep their own
    dtype, and so do their gradients. Differentiable any number of times.

    Raises:
        ValueError: for rows and weights of different dtypes without autocast.
    """
    device = x_SI.device.type
    autocast = torch.is_autocast_enabled(device) and x_SI.dtype != torch.float64
    if autocast:
        x_SI = x_SI.to(torch.get_autocast_dtype(device))
    elif x_SI.dtype != w_EIO.dtype:
        raise ValueError(f"rows are {x_SI.dtype}, weights {w_EIO.dtype}: give them one dtype")
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        y_SO: Tensor = _grouped_linear(x_SI, w_EIO, b_EO, expert_offsets)
    return y_SO

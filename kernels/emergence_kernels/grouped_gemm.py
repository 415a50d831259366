"""Matrix products over rows grouped by expert: one weight per group, groups of any size.

Letters: S rows sorted by expert, E experts, I input width, O output width. Weights are (E, I, O),
contiguous or as views of contiguous (E, O, I). Rows from the last offset on belong to no expert:
they are not read, and their results are zero.

bf16 on CUDA runs as one `torch.nn.functional.grouped_mm`; everything else runs one product per
expert, written straight into its place in the result.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional


def _one_launch(x: Tensor, *widths: int) -> bool:
    # grouped_mm's CUDA fast path is bf16 with 16-byte rows; other dtypes loop inside it and sync
    return x.is_cuda and x.dtype == torch.bfloat16 and all(width % 8 == 0 for width in widths)


def _groups(expert_offsets: Tensor) -> list[tuple[int, int, int]]:
    bounds = expert_offsets.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(pairwise(bounds)) if b > a]


def as_stored(w_EIO: Tensor) -> tuple[Tensor, bool]:
    """The weight contiguous, and whether as its transpose (E, O, I); a view where it can be."""
    if not w_EIO.is_contiguous() and w_EIO.mT.is_contiguous():
        return w_EIO.mT, True
    return w_EIO.contiguous(), False


def empty_gradient(w_EIO: Tensor) -> Tensor:
    """Memory for the gradient of a weight, transposed if the weight is: no optimizer copies it."""
    stored, transposed = as_stored(w_EIO)
    empty = torch.empty_like(stored)
    return empty.mT if transposed else empty


def clear_rest(y: Tensor, end: int | Tensor) -> Tensor:
    """`y` (S, O) with zeros in its rows from `end` on, where nothing was written."""
    if isinstance(end, int):
        y[end:].zero_()
        return y
    row_S = torch.arange(len(y), device=y.device)
    return y.masked_fill_((row_S >= end).unsqueeze(1), 0)


def grouped_gemm(
    x_SI: Tensor, w_EIO: Tensor, expert_offsets: Tensor, bias_EO: Tensor | None = None
) -> Tensor:
    """`x[rows of e] @ w[e] + bias[e]` for every expert e.

    Args:
        x_SI: (S, I), rows sorted by expert.
        w_EIO: (E, I, O); of another dtype than x it is cast, an expert at a time on CPUs.
        expert_offsets: (E+1,) int32, as in `Permutation`.
        bias_EO: (E, O) or None.

    Returns:
        (S, O) in the dtype of x, accumulated in at least fp32.
    """
    if _one_launch(x_SI, x_SI.shape[1], w_EIO.shape[2]):
        y_SO = functional.grouped_mm(x_SI, w_EIO.to(x_SI.dtype), offs=expert_offsets[1:])
        if bias_EO is not None:
            y_SO += rows_of_experts(bias_EO, expert_offsets, len(y_SO))
        return clear_rest(y_SO, expert_offsets[-1])
    y_SO = x_SI.new_empty(x_SI.shape[0], w_EIO.shape[2])
    for e, a, b in _groups(expert_offsets):
        w_IO = w_EIO[e].to(x_SI.dtype)
        if bias_EO is None:
            torch.mm(x_SI[a:b], w_IO, out=y_SO[a:b])
        else:
            torch.addmm(bias_EO[e], x_SI[a:b], w_IO, out=y_SO[a:b])
    return clear_rest(y_SO, int(expert_offsets[-1]))


def grouped_gemm_dx(dy_SO: Tensor, w_EIO: Tensor, expert_offsets: Tensor) -> Tensor:
    """Gradient (S, I) of the rows: `dy[rows of e] @ w[e].T` for every expert e."""
    if _one_launch(dy_SO, w_EIO.shape[1], w_EIO.shape[2]):
        w_EOI = w_EIO.to(dy_SO.dtype).transpose(1, 2)
        dx_SI = functional.grouped_mm(dy_SO, w_EOI, offs=expert_offsets[1:])
        return clear_rest(dx_SI, expert_offsets[-1])
    dx_SI = dy_SO.new_empty(dy_SO.shape[0], w_EIO.shape[1])
    for e, a, b in _groups(expert_offsets):
        torch.mm(dy_SO[a:b], w_EIO[e].to(dy_SO.dtype).t(), out=dx_SI[a:b])
    return clear_rest(dx_SI, int(expert_offsets[-1]))


def grouped_gemm_dw(
    x_SI: Tensor,
    dy_SO: Tensor,
    expert_offsets: Tensor,
    dtype: torch.dtype | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """Gradient (E, I, O) of the weights: `x[rows of e].T @ dy[rows of e]`, 0 for no rows.

    In `dtype`, after a product in that of the factors; contiguous, or with `transposed` a view of
    (E, O, I) that is.
    """
    if transposed:
        return grouped_gemm_dw(dy_SO, x_SI, expert_offsets, dtype).mT
    dtype = dtype or x_SI.dtype
    if _one_launch(x_SI, x_SI.shape[1], dy_SO.shape[1]):
        return functional.grouped_mm(x_SI.t(), dy_SO, offs=expert_offsets[1:]).to(dtype)
    bounds = expert_offsets.tolist()
    dw_EIO = x_SI.new_empty(len(bounds) - 1, x_SI.shape[1], dy_SO.shape[1], dtype=dtype)
    for e, (a, b) in enumerate(pairwise(bounds)):
        if dtype == x_SI.dtype:
            torch.mm(x_SI[a:b].t(), dy_SO[a:b], out=dw_EIO[e])
        else:
            dw_EIO[e] = x_SI[a:b].t() @ dy_SO[a:b]
    return dw_EIO


def grouped_sum(y_SO: Tensor, expert_offsets: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Sum (E, O) of the rows of every expert (the gradient of a bias), without atomics.

    In `dtype`, or that of the rows.
    """
    dtype = dtype or y_SO.dtype
    num_experts = expert_offsets.numel() - 1
    if y_SO.is_cuda:
        row_S = torch.arange(y_SO.shape[0], device=y_SO.device)
        member_ES = (row_S >= expert_offsets[:-1, None]) & (row_S < expert_offsets[1:, None])
        member_ES = member_ES.to(y_SO.dtype)
        if dtype == y_SO.dtype or y_SO.itemsize > 2:
            return (member_ES @ y_SO).to(dtype)
        # in 16 bits the product would round the sums before they are widened
        return torch.mm(member_ES, y_SO, out_dtype=torch.float32).to(dtype)
    sums_EO = y_SO.new_empty(num_experts, y_SO.shape[1], dtype=dtype)
    bounds = expert_offsets.tolist()
    for e, (a, b) in enumerate(pairwise(bounds)):
        torch.sum(y_SO[a:b], dim=0, dtype=dtype, out=sums_EO[e])
    return sums_EO


def rows_of_experts(per_expert_EO: Tensor, expert_offsets: Tensor, num_rows: int) -> Tensor:
    """(S, O): the row of each sorted row's expert, of any expert for a row without one."""
    row_S = torch.arange(num_rows, device=per_expert_EO.device, dtype=expert_offsets.dtype)
    expert_S = torch.searchsorted(expert_offsets[1:].contiguous(), row_S, right=True)
    return per_expert_EO[expert_S.clamp(max=len(per_expert_EO) - 1)]

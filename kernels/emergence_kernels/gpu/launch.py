"""What every launcher of a Triton kernel shares: the launch itself, dtypes, and layouts."""

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run `kernel` on `grid` with its arguments, compile-time constants and launch options.

    The one place where a kernel is started: whoever wants to know what would run (the resource
    table, the tests that compile for absent GPUs) listens here. An empty grid launches nothing.
    """
    if all(grid):
        kernel[grid](*arguments, **options)


def matmul_precision(tensor: Tensor) -> str:
    """How products of this tensor's dtype are computed: fp32 follows torch's own choice.

    `torch.set_float32_matmul_precision("high")` or "medium" gives tf32, "highest" IEEE fp32.
    """
    if tensor.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def with_contiguous_rows(tensor: Tensor) -> Tensor:
    """A 2-D tensor whose rows are contiguous, copied only if they are not."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()

"""What every launcher of a Triton kernel shares: the launch itself, dtypes, and layouts."""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run `kernel` on `grid` with its arguments, compile-time constants and launch options.

    The one place where a kernel is started: whoever wants to know what would run (the resource
    table, the tests that compile for absent GPUs) listens here. An empty grid launches nothing.
    """
    if all(grid):
        kernel[grid](*arguments, **options)


def supported(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these dtypes; fp64 is left to plain torch."""
    return all(t is None or t.dtype in TRITON_DTYPES for t in tensors)


def with_unit_rows(tensor: Tensor) -> Tensor:
    """`tensor` with its last dimension contiguous, copied only if it is not; other strides stay."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()

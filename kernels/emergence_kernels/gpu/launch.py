"""What every launcher of a Triton kernel shares: the launch itself, dtypes, and layouts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that it was to be started with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    """Compile-time constants by name, and Triton's own launch options."""


_recorder: list[Launch] | None = None


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Inside, kernels are not started but collected, so that launchers work on meta tensors."""
    global _recorder
    outer, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = outer


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run `kernel` on `grid` with its arguments, compile-time constants and launch options.

    The one place where a kernel is started, so that `recorded_launches` sees them all. An empty
    grid launches nothing.
    """
    if _recorder is not None:
        _recorder.append(Launch(kernel, grid, arguments, options))
    elif all(grid):
        kernel[grid](*arguments, **options)


def matmul_precision(tensor: Tensor) -> str:
    """How products of this tensor's dtype are computed: fp32 follows torch's own choice.

    `torch.set_float32_matmul_precision("high")` or "medium" gives tf32, "highest" IEEE fp32. ROCm
    always computes in IEEE fp32: its matrix units have that, and Triton no tf32.
    """
    if tensor.dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def with_contiguous_rows(tensor: Tensor) -> Tensor:
    """A 2-D tensor whose rows are contiguous, copied only if they are not."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()

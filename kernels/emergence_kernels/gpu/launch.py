"""What every launcher of a Triton kernel shares: the launch itself, dtypes, and layouts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that it was to be started with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    """Compile-time constants by name, and Triton's own launch options."""


@dataclass(frozen=True)
class _Compiled:
    """A compiled kernel, ready to be started."""

    run: Callable[..., None]
    function: Any
    """The loaded function's handle, of one device."""
    metadata: Any
    constants: tuple[Any, ...]
    """Values of the compile-time parameters, which follow the arguments in the signature."""


_recorder: list[Launch] | None = None
_compiled: dict[tuple[Any, ...], _Compiled] = {}


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
    """Run `kernel` on `grid` with its arguments, compile-time constants and launch options, on the
    device of its tensors.

    The one place where a kernel is started, so that `recorded_launches` sees them all. An empty
    grid launches nothing.
    """
    if _recorder is not None:
        _recorder.append(Launch(kernel, grid, arguments, options))
    elif not isinstance(kernel, JITFunction):  # the interpreter's
        if all(grid):
            kernel[grid](*arguments, **options)
    elif all(grid):
        device = next(a for a in arguments if isinstance(a, Tensor)).get_device()
        current = driver.active.get_current_device()
        with nullcontext() if device in (current, -1) else torch.cuda.device(device):
            _start(max(device, 0), kernel, grid, arguments, options)


def _start(
    device: int,
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    """Triton's own start binds and specialises every argument in Python, 20 to 60 us for kernels
    with many constants; once it has compiled one, later starts find it under what it depends on.
    """
    hooks = knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls
    if hooks or torch.version.hip:  # which also specialises on a tensor's size
        kernel[grid](*arguments, **options)
        return
    key = (device, kernel.fn, *map(specialization, arguments), *options.values())
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **options)
        constants = tuple(options[name] for name in kernel.arg_names[len(arguments) :])
        _compiled[key] = _Compiled(
            compiled.run, compiled.function, compiled.packed_metadata, constants
        )
        return
    found.run(
        *grid,
        *(1,) * (3 - len(grid)),
        driver.active.get_current_stream(device),
        found.function,
        found.metadata,
        None,
        None,
        None,
        *arguments,
        *found.constants,
    )


def specialization(argument: Any) -> Any:
    """What Triton compiles a kernel anew for, of an argument that is no compile-time constant."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1 or (argument % 16 == 0, -(2**31) <= argument < 2**31)
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, tuple(argument.block_shape)
    return argument


def cdiv(n: int, d: int) -> int:
    """The quotient rounded up. `triton.cdiv` is made for kernels and takes microseconds here."""
    return -(-n // d)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below a positive `n`."""
    return 1 << (n - 1).bit_length()


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

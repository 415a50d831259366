"""Compile a recorded launch for a GPU that need not be there, and read what it would use.

Triton needs a driver only to ask for the target, so one that answers is enough. Its wheel carries
NVIDIA's `ptxas` and `cuobjdump`; for AMD the assembly itself says what it uses.
"""

import dataclasses
import importlib
import re
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..processes import IMPORT_PACKAGE, warm_processes
from .defaults import Target
from .launch import Launch


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of a multiprocessor."""

    registers: int
    """32-bit registers per thread."""
    spilled_bytes: int
    """Local memory per thread: values that found no register."""
    instruction: str
    """wgmma, tcgen05, mma.sync or mfma: the matrix instruction; "none" for no matrix product."""
    wide_copies: int = 0
    """Loads of 16 bytes: asynchronous copies (`cp.async`), on AMD any load from global memory."""
    narrow_copies: int = 0
    """Asynchronous copies of fewer bytes."""
    bulk_copies: int = 0
    """Loads of whole tiles by the tensor memory accelerator."""
    shared_bytes: int = 0
    """Shared memory of a block."""
    tensor_columns: int = 0
    """Columns of tensor memory, from sm_100 on."""
    seconds: float = 0.0
    """Time to compile, near zero if Triton's cache had it."""


@dataclass(frozen=True)
class CompileJob:
    """A launch without its tensors, which can be sent to another process."""

    module: str
    kernel: str
    arguments: tuple[Any, ...]
    """A tensor is replaced by its dtype, all that a compilation depends on."""
    options: tuple[tuple[str, Any], ...]
    target: Target

    @classmethod
    def of(cls, launch: Launch, target: Target) -> "CompileJob":
        """The compilation that `launch` would need on `target`."""
        return cls(
            launch.kernel.fn.__module__,
            launch.kernel.fn.__name__,
            tuple(_without_data(argument) for argument in launch.arguments),
            tuple(sorted(launch.options.items())),
            target,
        )

    def key(self) -> str:
        """Equal for equal compilations."""
        return repr((self.kernel, self.arguments, self.options, self.target))

    def run(self) -> Resources:
        """Compile. Sets this process's driver; whatever Triton raises is passed on."""
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        driver.set_active(_AbsentDriver(_gpu_target(self.target)))
        kernel.device_caches.clear()
        start = time.perf_counter()
        arguments = [a.revive() if isinstance(a, _Descriptor) else a for a in self.arguments]
        compiled = kernel.warmup(*arguments, grid=(1,), **dict(self.options))
        seconds = time.perf_counter() - start
        if self.target.is_amd:
            found = _amd_resources(compiled.asm["amdgcn"])
        else:
            found = _nvidia_resources(compiled.asm["cubin"], compiled.asm["ptx"])
        return dataclasses.replace(
            found,
            shared_bytes=compiled.metadata.shared,
            tensor_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
            seconds=seconds,
        )


def compile_in_parallel(jobs: Sequence[CompileJob], processes: int) -> Iterator[Resources | str]:
    """What every job gives, in order: its resources, or why it does not compile.

    Triton's cache then has the kernels, and a launch in any process takes milliseconds.
    """
    context = warm_processes("triton", "torch", __name__)
    with ProcessPoolExecutor(processes, context, exec, (IMPORT_PACKAGE, {})) as pool:
        yield from pool.map(_outcome, jobs)


def _outcome(job: CompileJob) -> Resources | str:
    warnings.simplefilter("ignore")
    try:
        return job.run()
    except Exception as error:  # noqa: BLE001  whatever a compiler raises is a finding
        return f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[-200:]}"


@dataclass(frozen=True)
class _Descriptor:
    """What a compilation depends on of a tensor descriptor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    block_shape: tuple[int, ...]

    def revive(self) -> TensorDescriptor:
        base = MockTensor(self.dtype, list(self.shape))
        return TensorDescriptor.from_tensor(base, list(self.block_shape))


def _without_data(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype
    if isinstance(argument, TensorDescriptor):
        return _Descriptor(argument.base.dtype, tuple(argument.shape), tuple(argument.block_shape))
    return argument


class _AbsentDriver:
    """Answers what a compilation asks of a driver."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _gpu_target(target: Target) -> GPUTarget:
    if target.is_amd:
        return GPUTarget("hip", target.name, 64)
    return GPUTarget("cuda", int(target.name.removeprefix("sm_")), 32)


_NVIDIA_INSTRUCTIONS = {"wgmma": "wgmma.mma", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync"}


def _nvidia_resources(cubin: bytes, ptx: str) -> Resources:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    instructions = (name for name, mark in _NVIDIA_INSTRUCTIONS.items() if mark in ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+|\d+)", ptx)
    wide = sum(int(size, 0) == 16 for size in copies)
    return Resources(
        registers=used["REG"],
        spilled_bytes=used["STACK"] + used["LOCAL"],
        instruction=next(instructions, "none"),
        wide_copies=wide,
        narrow_copies=len(copies) - wide,
        bulk_copies=ptx.count("cp.async.bulk.tensor"),
    )


def _amd_resources(assembly: str) -> Resources:
    used = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\n", assembly)}
    spilled = 4 * (used["vgpr_spill_count"] + used["sgpr_spill_count"])
    return Resources(
        registers=used["vgpr_count"],
        spilled_bytes=max(spilled, used["private_segment_fixed_size"]),
        instruction="mfma" if "v_mfma" in assembly else "none",
        wide_copies=len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly)),
    )

"""Configurations that need no measurement, and those that tuning may choose from.

Letters: S routed rows, E experts.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from functools import cache

import torch
from triton.runtime.driver import driver

from emergence_kernels.gpu.gemm_config import GemmConfig, GemmPlan, Product


@dataclass(frozen=True)
class Target:
    """What a configuration has to fit."""

    name: str
    """sm_80, sm_89, sm_90, sm_100, ... or gfx942, ..."""
    shared_bytes: int
    """Shared memory that one block may use."""

    @property
    def is_amd(self) -> bool:
        """ROCm rather than CUDA."""
        return self.name.startswith("gfx")


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", 166_912),
        Target("sm_89", 101_376),
        Target("sm_90", 232_448),
        Target("sm_100", 232_448),
        Target("gfx942", 65_536),
    )
}
"""The architectures that the kernels are compiled for in the tests."""


@cache
def target_of(device: torch.device) -> Target:
    """The target of a CUDA or ROCm device; sm_80's limits where there is none (the interpreter)."""
    if device.type != "cuda":
        return TARGETS["sm_80"]
    shared = driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target(properties.gcnArchName.split(":")[0], shared)
    return Target(f"sm_{properties.major}{properties.minor}", shared)


def rows_bucket(num_rows: int, num_experts: int) -> int:
    """Mean rows per expert, rounded up to a power of two from 16 to 4,096: the key of tuning."""
    mean = -(-num_rows // num_experts)
    return min(max(1 << max(mean - 1, 0).bit_length(), 16), 4096)


@cache
def default_plan(
    target: Target, dtype: torch.dtype, precision: str, bucket: int, *, gated: bool
) -> GemmPlan:
    """A configuration per product: the largest tile that matrix units, registers and shared memory
    take for the dtype, and a smaller one where experts have few rows.

    Args:
        target: architecture and shared memory.
        dtype: of the factors.
        precision: "ieee" or "tf32", which matters for fp32.
        bucket: from `rows_bucket`.
        gated: whether the up projection accumulates gate and up columns at once.
    """
    rows = min(bucket, 128)
    if dtype == torch.float32 and precision == "ieee":
        # no matrix unit: small tiles keep more multiprocessors busy
        base = GemmConfig(min(rows, 64), 64, 16, warps=4, stages=2)
        up = dataclasses.replace(base, block_n=32) if gated else base
        return GemmPlan(up, base, base, base, dataclasses.replace(base, block_m=64, stages=3))
    block_k = 32 if dtype == torch.float32 or target.is_amd else 64
    stages = 2 if target.is_amd else 3
    wide = GemmConfig(rows, 128, block_k, warps=8 if rows > 64 else 4, stages=stages)
    narrow = wide
    if bucket <= 256:
        # few row tiles and a narrow output: more programs instead of larger ones
        narrow = dataclasses.replace(wide, block_n=64, warps=4)
    weight = GemmConfig(128, 128, block_k, warps=8, stages=stages + 1)
    up = dataclasses.replace(wide, block_n=64) if gated else wide
    return GemmPlan(up, narrow, wide, narrow, weight)


_WIDE_EPILOGUE: tuple[Product, ...] = ("up", "activation_grad")
"""Products whose epilogue needs the registers that a larger accumulator would take."""


def candidates(
    product: Product,
    target: Target,
    dtype: torch.dtype,
    bucket: int,
    *,
    precision: str = "ieee",
    gated: bool = True,
) -> list[GemmConfig]:
    """What tuning may choose for one product, the default apart; all fit the shared memory."""
    found = []
    for block_m, block_n, block_k, stages, persistent in itertools.product(
        (64, 128, 256), (64, 128, 256), (32, 64), (2, 3, 4, 5), (False, True)
    ):
        if product != "weight_grad" and block_m > max(bucket, 64):
            continue
        if block_m * block_n > (128 * 128 if product in _WIDE_EPILOGUE else 128 * 256):
            continue
        if (block_m + block_n) * block_k * dtype.itemsize * stages > target.shared_bytes:
            continue
        warps = 4 if block_m * block_n <= 128 * 64 else 8
        found.append(GemmConfig(block_m, block_n, block_k, warps, stages, persistent=persistent))
    return found

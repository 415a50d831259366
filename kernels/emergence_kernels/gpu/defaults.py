"""Configurations that need no measurement, and those that tuning may choose from.

Letters: S routed rows, E experts.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache

import torch
from triton.runtime.driver import driver

from .gemm_config import PRODUCTS, GemmConfig, GemmPlan, Product


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
        base = GemmConfig(min(rows, 64), 64, 16, warps=4, stages=2 if target.is_amd else 3)
        up = dataclasses.replace(base, block_n=32) if gated else base
        return GemmPlan(up, base, base, base, dataclasses.replace(base, block_m=64))
    if target.name == "sm_90" and dtype.itemsize == 2:
        return _hopper_plan(bucket, gated=gated)
    block_k = 32 if dtype == torch.float32 or target.is_amd else 64
    stages = 2 if target.is_amd else 3
    wide = GemmConfig(rows, 128, block_k, warps=8 if rows > 64 else 4, stages=stages)
    narrow = wide
    if bucket <= 256 and not (dtype == torch.float32 and rows == 64):  # which spills on sm_100
        # few row tiles and a narrow output: more programs instead of larger ones
        narrow = dataclasses.replace(wide, block_n=64, warps=4)
    weight = GemmConfig(128, 128, block_k, warps=8, stages=stages + 1)
    up = dataclasses.replace(wide, block_n=64) if gated else wide
    plan = (up, narrow, wide, narrow, weight)
    return GemmPlan(*(_shortened(config, target, dtype) for config in plan))


def _hopper_plan(bucket: int, *, gated: bool) -> GemmPlan:
    """What was fastest on an H200 (`docs/results/h200`), for 16-bit factors.

    Two blocks of 128x128 share a multiprocessor where the epilogue takes long; elsewhere one of
    128x256 reads less. Few rows make many short products, whose loads need a deep pipeline. The
    weight's gradient has tails of rows, which a descriptor cannot leave out; it pays from 1,024 on.
    """
    wide = GemmConfig(128, 128, 64, warps=8, stages=3, tma=True)
    deep = GemmConfig(64, 128, 64, warps=4, stages=6, tma=True)
    large = GemmConfig(128, 256, 64, warps=8, stages=4, tma=True, persistent=True)
    weight = dataclasses.replace(wide, tma=False)
    if bucket >= 1024:
        weight = dataclasses.replace(wide, warps=4)
    if bucket >= 512:
        return GemmPlan(wide, large, large, large, weight)
    up = GemmConfig(64, 64 if gated else 128, 64, warps=4, stages=3, tma=True)
    return GemmPlan(up, deep, wide if bucket > 64 else deep, deep, weight)


def _shortened(config: GemmConfig, target: Target, dtype: torch.dtype) -> GemmConfig:
    """`config` with a pipeline short enough for the shared memory."""
    while config.stages > 1 and not _fits(config, target, dtype):
        config = dataclasses.replace(config, stages=config.stages - 1)
    return config


def candidates(
    product: Product,
    target: Target,
    dtype: torch.dtype,
    bucket: int,
    *,
    precision: str = "ieee",
    gated: bool = True,
) -> list[GemmConfig]:
    """What tuning may choose for one product, the default apart.

    Nothing for IEEE fp32, which has no matrix units to keep busy. The others compile for `TARGETS`
    without spilling by the Triton of the tested versions, as
    `python -m emergence_kernels.gpu.resources --configs all` checks; what `_fits` and `_spills`
    leave out would not.

    Args:
        product: which of the five.
        target: architecture and shared memory.
        dtype: of the factors.
        bucket: from `rows_bucket`.
        precision: "ieee" or "tf32", which matters for fp32.
        gated: whether the activation multiplies two halves.
    """
    if dtype == torch.float32 and precision == "ieee":
        return []
    return [
        config
        for block_m, block_n in _tiles(product, bucket)
        for config in _variants(product, block_m, block_n, target, dtype, precision, gated=gated)
        if _fits(config, target, dtype)
        and not _spills(product, config, target, precision, gated=gated)
    ]


def _tiles(product: Product, bucket: int) -> list[tuple[int, int]]:
    """(block_m, block_n) worth trying for experts of `bucket` rows."""
    if product == "weight_grad":
        return [(64, 128), (128, 128), (128, 256)]
    if bucket < 64:
        return [(bucket, 64), (bucket, 128), (64, 128)]
    if bucket == 64:
        return [(64, 64), (64, 128), (64, 256)]
    tiles = [(64, 128), (128, 64), (128, 128)]
    # the up projection's epilogue needs the registers that a larger accumulator would take
    return tiles if product == "up" else [*tiles, (128, 256)]


def _variants(
    product: Product,
    block_m: int,
    block_n: int,
    target: Target,
    dtype: torch.dtype,
    precision: str,
    *,
    gated: bool,
) -> list[GemmConfig]:
    """One tile with other pipelines, other orders, and other ways to load."""
    # the gated up projection keeps two accumulators
    per_warp = 64 * 64 if product == "up" and gated else 128 * 64
    warps = 4 if block_m * block_n <= per_warp else 8
    base = GemmConfig(block_m, block_n, 64 if dtype.itemsize == 2 else 32, warps, 3)
    if target.is_amd:
        base = dataclasses.replace(base, block_k=32, stages=2)
        return [base, dataclasses.replace(base, persistent=True)]
    if precision == "tf32":
        return [base, dataclasses.replace(base, persistent=True)]
    deep = dataclasses.replace(base, stages=4)
    found = [base, deep, dataclasses.replace(deep, persistent=True)]
    if target.name in ("sm_90", "sm_100"):
        described = dataclasses.replace(deep, tma=True)
        found += [dataclasses.replace(described, stages=stages) for stages in (3, 4, 6)]
        found.append(dataclasses.replace(described, persistent=True))
        if target.name == "sm_100" and product in ("down", "input_grad"):
            found.append(dataclasses.replace(described, specialize=True))
    return found


def _fits(config: GemmConfig, target: Target, dtype: torch.dtype) -> bool:
    """Whether the pipeline's buffers, and a margin for barriers, are within the shared memory."""
    stage = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
    return stage * config.stages + 2048 <= target.shared_bytes


_TF32_SPILLS: tuple[tuple[Product, tuple[int, int]], ...] = (
    ("up", (64, 64)),
    ("up", (128, 128)),
    ("activation_grad", (64, 64)),
    ("input_grad", (64, 64)),
    *((product, (128, 256)) for product in PRODUCTS),
)


def _spills(
    product: Product, config: GemmConfig, target: Target, precision: str, *, gated: bool
) -> bool:
    """Whether some target's compiler runs out of registers, or this one's."""
    tile = (config.block_m, config.block_n)
    if product == "up" and gated:
        return config.block_m * config.block_n > 1024 * config.warps  # two accumulators
    if product == "up" and tile == (32, 128):
        return not config.tma
    if product == "weight_grad" and tile == (128, 256) and target.name == "sm_100":
        return not config.tma  # in fp32 from 16-bit factors
    return precision == "tf32" and (product, tile) in _TF32_SPILLS

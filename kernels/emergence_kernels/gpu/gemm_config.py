"""How the grouped products are cut into tiles: defaults that need no measurement, and candidates.

Letters: S routed rows, E experts.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

Product = Literal["up", "down", "activation_grad", "input_grad", "weight_grad"]
PRODUCTS: tuple[Product, ...] = get_args(Product)


@dataclass(frozen=True)
class GemmConfig:
    """Tile shape and launch options of one grouped product.

    For the four products over rows, M counts routed rows, N output columns and K the reduction;
    for `weight_grad` M and N are the weight's two widths and K the routed rows.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    """Depth of the software pipeline that loads the factors."""
    group_m: int = 8
    """Row tiles that go through the weights together, for the L2 cache."""
    persistent: bool = False
    """One program per multiprocessor walks over the tiles, instead of one program per tile."""

    def options(self) -> dict[str, int]:
        """Compile-time constants and launch options, by the names that the kernels use."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }

    def programs(self, tiles: int, device: torch.device) -> int:
        """Programs to start for `tiles` tiles."""
        if not self.persistent:
            return tiles
        if device.type == "cuda":
            return min(tiles, torch.cuda.get_device_properties(device).multi_processor_count)
        return min(tiles, 3)  # the interpreter: few enough that programs walk over several tiles


@dataclass(frozen=True)
class GemmPlan:
    """A configuration for each of the five products of the expert MLP."""

    up: GemmConfig
    down: GemmConfig
    activation_grad: GemmConfig
    input_grad: GemmConfig
    weight_grad: GemmConfig


@dataclass(frozen=True)
class Target:
    """What a configuration has to fit: an architecture and how much memory a block may share."""

    name: str
    """sm_80, sm_89, sm_90, sm_100, ... or gfx942, ..."""
    shared_bytes: int

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


def current_target(device: torch.device) -> Target:
    """The target of a CUDA or ROCm device."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target(properties.gcnArchName.split(":")[0], 65_536)
    name = f"sm_{properties.major}{properties.minor}"
    return Target(name, properties.shared_memory_per_block_optin)

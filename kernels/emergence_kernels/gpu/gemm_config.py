"""How a grouped product is cut into tiles."""

import dataclasses
import json
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal, get_args

import torch

Product = Literal["up", "down", "activation_grad", "input_grad", "weight_grad"]
PRODUCTS: tuple[Product, ...] = get_args(Product)
_LARGEST = 1024
"""More than any tile, group, pipeline or number of warps."""


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
    tma: bool = False
    """Load both factors through tensor descriptors, where the device has them (sm_90 on) and rows
    are 16-byte aligned."""
    specialize: bool = False
    """With `tma`, for the products of `row_product`: on sm_100 some warps load while others
    multiply."""

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

    def __post_init__(self) -> None:
        assert self.tma or not self.specialize, "specialize needs tma"

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

    @cached_property
    def encoded(self) -> str:
        """As JSON, the form in which an operator's schema can carry it."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    @cache
    def decode(text: str) -> "GemmPlan":
        """The plan that `encoded` is of.

        Raises:
            ValueError: for anything else.
        """
        try:
            plan = GemmPlan(
                **{name: GemmConfig(**config) for name, config in json.loads(text).items()}
            )
            for config in vars(plan).values():
                for field in dataclasses.fields(GemmConfig):
                    value = getattr(config, field.name)
                    if type(value) is not field.type or not (0 <= value <= _LARGEST):
                        raise TypeError(f"{field.name} {value!r}")
            return plan
        except (TypeError, AttributeError, AssertionError, RecursionError, ValueError) as error:
            raise ValueError(f"not a plan of the five products: {error}") from error


def rows_bucket(num_rows: int, num_experts: int) -> int:
    """Mean rows per expert, rounded up to a power of two from 16 to 4,096: the key of tuning."""
    mean = -(-num_rows // num_experts)
    return min(max(1 << max(mean - 1, 0).bit_length(), 16), 4096)

"""The arithmetics a path is certified in, and how much error each of them may add."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch

from moe_emergence.names import DtypeName


@dataclass(frozen=True)
class Arithmetic:
    """Number formats of one run of the layer.

    `factor` bounds a path's error as a multiple of the sequential path's own. Independent rounding
    errors add in the mean square, so a path that rounds n times where the definition rounds m times
    has sqrt(n / m) of its error. In low precision every rounding to the stored format counts and a
    path may have at most 1.5^2 = 2.25 times the definition's; in fp32 only the order of the sums
    differs, which the matrix product of every shape chooses for itself, and four times the
    variance is allowed. fp64 has no factor: it is compared with a bound of its own.
    """

    name: DtypeName
    stored: torch.dtype
    """Of the tokens and of every parameter."""
    computed: torch.dtype
    """Of the matrix products' operands and of the output."""
    factor: float | None

    @property
    def autocast(self) -> bool:
        """Whether parameters are cast on the way."""
        return self.stored != self.computed

    @contextlib.contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """Run the block in this arithmetic: fp32 products in full unless this is tf32."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.name == "tf32" else "highest")
        try:
            with torch.autocast(device.type, self.computed, enabled=self.autocast):
                yield
        finally:
            torch.set_float32_matmul_precision(before)


_ARITHMETICS = {
    a.name: a
    for a in (
        Arithmetic("fp64", torch.float64, torch.float64, None),
        Arithmetic("fp32", torch.float32, torch.float32, 2.0),
        Arithmetic("tf32", torch.float32, torch.float32, 2.0),
        Arithmetic("bf16", torch.bfloat16, torch.bfloat16, 1.5),
        Arithmetic("fp16", torch.float16, torch.float16, 1.5),
        Arithmetic("autocast-bf16", torch.float32, torch.bfloat16, 1.5),
    )
}


def available_dtypes(device: torch.device) -> tuple[DtypeName, ...]:
    """All that the device has: tf32 from compute capability 8.0 on, as bf16."""
    names: tuple[DtypeName, ...] = get_args(DtypeName)
    if device.type == "cpu":
        return tuple(name for name in names if name != "tf32")
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return names
    return tuple(name for name in names if name in ("fp64", "fp32", "fp16"))


def get_arithmetic(name: DtypeName, device: torch.device) -> Arithmetic:
    """The arithmetic called `name`.

    Raises:
        ValueError: where the device does not have it.
    """
    available = available_dtypes(device)
    if name not in available:
        raise ValueError(
            f"--dtype {name}: this {device.type} device does not have it; "
            f"choose from {', '.join(available)}"
        )
    return _ARITHMETICS[name]

"""Factors as the matrix units read them: in tf32, numbers of which the last 13 bits are zero.

The units drop those bits, an error of one sign that adds up over a sum. Rounded to nearest before,
factors lose half as much at most, and as often up as down.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch


@triton.jit
def _round_to_tf32_kernel(
    x_ptr,  # (numel,) fp32
    rounded_ptr,  # (numel,) fp32 out; may be x itself
    numel,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks,). To nearest, ties to even; a NaN stays as it is."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < numel, other=0.0)
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
    rounded = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    tl.store(rounded_ptr + place, rounded, mask=place < numel)


def as_factor(tensor: Tensor, precision: str, *, in_place: bool = False) -> Tensor:
    """A contiguous `tensor` for products of `precision`: rounded in tf32, itself otherwise."""
    if precision != "tf32":
        return tensor
    rounded = tensor if in_place else torch.empty_like(tensor)
    blocks = cdiv(tensor.numel(), 1024)
    launch(
        _round_to_tf32_kernel, (blocks,), tensor, rounded, tensor.numel(), BLOCK=1024, num_warps=4
    )
    return rounded

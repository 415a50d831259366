"""Activations and their derivatives inside kernels, in fp32.

The twins are `emergence_kernels.activations.activate` and `activate_backward`.
"""

import triton
import triton.language as tl


@triton.jit
def gelu_tanh(x):
    """GPT-2's GELU and its derivative. `0.5 (1 + tanh u)` is written as `gate = 1 / (1 + t)` with
    `t = exp(-2u)`, and `1 - gate` as `t * gate`.

    The derivative multiplies `1 - gate` by numbers of order ten; as a difference from one it would
    lose more than torch's derivative does. Below -9.9, where `t` is still finite, both results are
    under 1e-34 and stay as they are there.
    """
    x = tl.maximum(x, -9.9, propagate_nan=tl.PropagateNan.ALL)
    square = x * x
    # in powers of two, what the hardware has: 1.5957691216057308 * log2(e)
    t = tl.exp2(-x * (2.302208198 + 0.102943240 * square))
    gate = 1.0 / (1.0 + t)
    act = x * gate
    slope = 1.5957691216057308 + 0.214064449 * square
    return act, gate + act * (t * gate) * slope


@triton.jit
def silu(x):
    """`x * sigmoid(x)` and its derivative."""
    gate = tl.sigmoid(x)
    return x * gate, gate * (1.0 + x * (1.0 - gate))

"""Activations and their derivatives inside kernels, in fp32.

The twins are `emergence_kernels.activations.activate` and `activate_backward`.
"""

import triton
import triton.language as tl


@triton.jit
def gelu_tanh(x):
    """GPT-2's GELU and its derivative. `0.5 (1 + tanh u)` is written as `sigmoid(2u)`.

    The derivative multiplies `1 - gate` by numbers of order ten; as a difference from one it would
    lose more than torch's derivative does.
    """
    u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    gate = tl.sigmoid(u)
    slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return x * gate, gate + x * gate * tl.sigmoid(-u) * slope


@triton.jit
def silu(x):
    """`x * sigmoid(x)` and its derivative."""
    gate = tl.sigmoid(x)
    return x * gate, gate * (1.0 + x * (1.0 - gate))

"""Expert activations and their derivatives, as functions of the pre-activation.

Letters: S routed rows, F expert width, P pre-activation width (F, or 2F for SwiGLU: gate, then up).
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Activation = Literal["gelu_tanh", "swiglu"]


def pre_activation_width(activation: Activation, width: int) -> int:
    """Columns P of the up projection for an expert of width F."""
    return 2 * width if activation == "swiglu" else width


def activate(pre_SP: Tensor, activation: Activation) -> Tensor:
    """A (S, F): tanh-approximated GELU (GPT-2's), or SwiGLU (arXiv 2002.05202)."""
    if activation == "gelu_tanh":
        return functional.gelu(pre_SP, approximate="tanh")
    gate_SF, up_SF = pre_SP.chunk(2, dim=-1)
    return functional.silu(gate_SF) * up_SF


def activate_backward(grad_SF: Tensor, pre_SP: Tensor, activation: Activation) -> Tensor:
    """Gradient (S, P) of the pre-activation from the gradient (S, F) of the activation."""
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_backward(grad_SF, pre_SP, approximate="tanh")
    gate_SF, up_SF = pre_SP.chunk(2, dim=-1)
    grad_SP = torch.empty_like(pre_SP)
    grad_gate_SF, grad_up_SF = grad_SP.chunk(2, dim=-1)
    grad_gate_SF.copy_(torch.ops.aten.silu_backward(grad_SF * up_SF, gate_SF))
    torch.mul(grad_SF, functional.silu(gate_SF), out=grad_up_SF)
    return grad_SP

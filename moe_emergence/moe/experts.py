"""The experts: weights stacked, (E, in, out), and a path through them.

Letters: T tokens, E experts, H model width, F expert width, P pre-activation width (F, or 2F for
SwiGLU).
"""

from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor, nn

from emergence_kernels.activations import Activation, pre_activation_width

if TYPE_CHECKING:
    from moe_emergence.moe.dispatch import Dispatcher


class Experts(nn.Module):
    """E two-layer MLPs of the same shape.

    "gelu_tanh" experts are GPT-2's MLP: w1 (E, H, F), w1_bias (E, F), w2 (E, F, H), w2_bias (E, H).
    Stacked biases are matrices: "bias" in the name keeps optimizers from decaying them.
    "swiglu" experts have no biases and w1 (E, H, 2F): the gate's columns, then the up projection's.
    The layout (in, out) is that of GPT-2's `Conv1D` and of `torch.nn.functional.grouped_mm`.

    Raises:
        ValueError: for another activation.
    """

    w1_bias: nn.Parameter | None
    w2_bias: nn.Parameter | None
    dispatcher: "Dispatcher"
    """The path, see `get_dispatcher`; no part of the state dict, and free to change."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        expert_size: int,
        activation: Activation = "gelu_tanh",
    ) -> None:
        super().__init__()
        if activation not in get_args(Activation):
            raise ValueError(
                f"activation {activation!r}: choose from {', '.join(get_args(Activation))}"
            )
        self.num_experts = num_experts
        self.activation: Activation = activation
        width = pre_activation_width(activation, expert_size)
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_size, width))
        self.w2 = nn.Parameter(torch.empty(num_experts, expert_size, hidden_size))
        if activation == "gelu_tanh":
            self.w1_bias = nn.Parameter(torch.empty(num_experts, width))
            self.w2_bias = nn.Parameter(torch.empty(num_experts, hidden_size))
        else:
            self.register_parameter("w1_bias", None)
            self.register_parameter("w2_bias", None)
        self.reset_parameters()

    def forward(self, x_TH: Tensor, topk_experts: Tensor, topk_weights: Tensor) -> Tensor:
        """Weighted sum (T, H) of every token's experts (T, K) with its weights (T, K).

        The signature is that of transformers' experts. The weights are read in here, and nowhere
        else in a pass: what acts on a module's call (offloading, adapters, sharding, pruning,
        hooks) acts on them.
        """
        return self.dispatcher(x_TH, topk_experts, topk_weights, self)

    def reset_parameters(self, std: float = 0.02) -> None:
        """GPT-2's initialisation: normal weights with standard deviation `std`, zero biases."""
        nn.init.normal_(self.w1, std=std)
        nn.init.normal_(self.w2, std=std)
        for bias in (self.w1_bias, self.w2_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def unbind(self) -> list[tuple[Tensor, Tensor | None, Tensor, Tensor | None]]:
        """(w1, b1, w2, b2) of every expert.

        `unbind` rather than indexing: autograd then builds one gradient per stacked parameter
        instead of a full zero tensor per expert.
        """
        none: list[Tensor | None] = [None] * self.num_experts
        b1 = none if self.w1_bias is None else list(self.w1_bias.unbind())
        b2 = none if self.w2_bias is None else list(self.w2_bias.unbind())
        return list(zip(self.w1.unbind(), b1, self.w2.unbind(), b2, strict=True))

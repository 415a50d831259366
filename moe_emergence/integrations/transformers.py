"""`experts_implementation="emergence"`: any mixture in transformers through this library's kernels,
and any implementation registered there as a dispatcher for this library's own models.

transformers' experts are called with tokens, the K experts of each and their weights, and hold
`gate_up_proj` (with a gate) or `up_proj`, and `down_proj`, as (E, in, out) if `is_transposed`, else
(E, out, in), with `*_bias` if `has_bias`. Both layouts are read as they lie.

Letters: T tokens, H model width, F expert width, P pre-activation width (F, or 2F with a gate),
E experts, K experts per token, S = T*K rows sorted by expert.
"""

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN, GELUTanh, NewGELUActivation, SiLUActivation
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    ExpertsInterface,
    _default_apply_gate,
)

from emergence_kernels import Permutation, expert_mlp, grouped_linear, sort_by_expert
from emergence_kernels.activations import Activation
from moe_emergence.moe.experts import Experts

NAME = "emergence"


def register() -> None:
    """Make `experts_implementation="emergence"` known to every model in transformers."""
    ExpertsInterface.register(NAME, experts_forward)


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Weighted sum (T, H) of every token's experts, in the dtype of `hidden_states` (T, H).

    SwiGLU and tanh GELU experts run as one operator. With another gate or activation, or a norm
    behind the experts, the model's own function runs between two linear layers per expert, so that
    nothing is approximated. Under expert parallelism an id of E is an expert that is elsewhere: it
    adds nothing and its weight's gradient is zero.

    Args:
        self: transformers' experts, see `use_experts_implementation`.
        hidden_states: (T, H).
        top_k_index: (T, K) int64, distinct in a row.
        top_k_weights: (T, K).

    Raises:
        ValueError: for weights that are not floating numbers of two bytes or more, as when they
            are quantized.
    """
    experts: Any = self
    w1, b1 = _projection(experts, "gate_up_proj" if experts.has_gate else "up_proj")
    w2, b2 = _projection(experts, "down_proj")
    permutation = _sorted(experts, top_k_index)
    weights_TK = top_k_weights.to(torch.promote_types(top_k_weights.dtype, torch.float32))
    activation = _fused_activation(experts)
    if activation is not None:
        y_TH = expert_mlp(hidden_states, weights_TK, w1, b1, w2, b2, permutation, activation)
        return y_TH.to(hidden_states.dtype)
    top_k = top_k_index.shape[1]
    # repeated, then permuted: the backward of a gather with repeated rows adds in any order
    x_SH = hidden_states.repeat_interleave(top_k, dim=0)[permutation.perm]
    pre_SP = _linear(x_SH, w1, b1, permutation.expert_offsets)
    act_SF = experts._apply_gate(pre_SP) if experts.has_gate else experts.act_fn(pre_SP)
    out_SH = _linear(act_SF, w2, b2, permutation.expert_offsets)
    if experts.has_post_expert_norm:
        out_SH = experts.post_expert_norm(out_SH)
    out_TKH = out_SH[permutation.inv_perm].unflatten(0, top_k_index.shape)
    return (out_TKH * weights_TK.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype)


def _projection(experts: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """A weight as (E, in, out), and its bias."""
    weight: Tensor = getattr(experts, name)
    if not weight.is_floating_point() or weight.itemsize < 2:
        raise ValueError(
            f'experts_implementation="{NAME}": {name} of {type(experts).__name__} is '
            f"{weight.dtype}; give floating weights of 16 bits or more, or another implementation"
        )
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    return weight if experts.is_transposed else weight.mT, bias


def _linear(x_SI: Tensor, w_EIO: Tensor, b_EO: Tensor | None, expert_offsets: Tensor) -> Tensor:
    """`grouped_linear` in the dtype of the weight.

    Under autocast the product is rounded to 16 bits, but neither the bias nor what is done to the
    sum is, as in the models' own loops: a limit acts on other elements of a rounded one.
    """
    if not torch.is_autocast_enabled(x_SI.device.type) or w_EIO.dtype == torch.float64:
        return grouped_linear(x_SI, w_EIO, b_EO, expert_offsets)
    y_SO = grouped_linear(x_SI, w_EIO, None, expert_offsets).to(w_EIO.dtype)
    if b_EO is None:
        return y_SO
    row_S1 = torch.arange(len(y_SO), device=y_SO.device).unsqueeze(1)
    member_SE = (row_S1 >= expert_offsets[:-1]) & (row_S1 < expert_offsets[1:])
    with torch.autocast(x_SI.device.type, enabled=False):
        return y_SO + member_SE.to(b_EO.dtype) @ b_EO


def _sorted(experts: Any, topk_experts_TK: Tensor) -> Permutation:
    """The rows by expert; behind them those of experts that are elsewhere."""
    if not experts._is_expert_parallel:
        return sort_by_expert(topk_experts_TK, experts.num_experts)
    found = sort_by_expert(topk_experts_TK, experts.num_experts + 1)
    return found._replace(expert_offsets=found.expert_offsets[:-1])


def _fused_activation(experts: Any) -> Activation | None:
    """What the operator calls these experts' activation; None for one that it does not have."""
    if experts.has_post_expert_norm:
        return None
    if not experts.has_gate:
        return "gelu_tanh" if isinstance(experts.act_fn, GELUTanh | NewGELUActivation) else None
    # a gate of the model's own, on the class or on this module, is not transformers' default
    is_default = getattr(experts._apply_gate, "__func__", None) is _default_apply_gate
    if is_default and isinstance(experts.act_fn, SiLUActivation | nn.SiLU):
        return "swiglu"
    return None


ExpertsFunction = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def get_implementation(name: str) -> tuple[str, ExpertsFunction]:
    """Under what transformers has an experts function registered, and the function.

    Args:
        name: as registered; or MODULE:NAME, where importing MODULE registers NAME.

    Raises:
        ValueError: for a module that cannot be imported, and a name that is not registered, saying
            which are.
    """
    module, _, registered = name.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"--implementation {name}: {module}: {error}") from error
    if registered not in ALL_EXPERTS_FUNCTIONS:
        known = ", ".join(sorted(ALL_EXPERTS_FUNCTIONS))
        raise ValueError(f"--implementation {name}: transformers knows {known}")
    return registered, ALL_EXPERTS_FUNCTIONS[registered]


class ImplementationDispatcher:
    """The path of this library's experts through what transformers has registered as `name`.

    Raises:
        ValueError: see `get_implementation`; and when called, for what the function cannot be
            loaded for, or says itself that it does not take.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        _, self.function = get_implementation(name)

    def __call__(
        self, x_TH: Tensor, topk_experts: Tensor, topk_weights: Tensor, experts: Experts
    ) -> Tensor:
        """Weighted sum (T, H) of every token's experts, under autocast in the autocast dtype."""
        shown: Any = _Shown(experts)
        try:
            y_TH = self.function(shown, x_TH, topk_experts, topk_weights)
        except (ImportError, NotImplementedError, ValueError) as error:
            raise ValueError(f"--implementation {self.name}: {error}") from error
        # transformers' functions return the dtype of the tokens
        device = x_TH.device.type
        if torch.is_autocast_enabled(device) and x_TH.dtype != torch.float64:
            return y_TH.to(torch.get_autocast_dtype(device))
        return y_TH


class _Shown:
    """This library's experts with the attributes that transformers' functions read."""

    is_transposed, is_concatenated, has_post_expert_norm = True, True, False
    _is_expert_parallel = False
    _apply_gate = _default_apply_gate

    def __init__(self, experts: Experts) -> None:
        self.num_experts = len(experts.w1)
        self.has_gate = experts.activation == "swiglu"
        self.has_bias = experts.w1_bias is not None
        hidden_act = "silu" if self.has_gate else "gelu_pytorch_tanh"
        self.config = SimpleNamespace(hidden_act=hidden_act)
        self.act_fn = ACT2FN[hidden_act]
        self.down_proj, self.down_proj_bias = experts.w2, experts.w2_bias
        if self.has_gate:
            self.gate_up_proj, self.gate_up_proj_bias = experts.w1, experts.w1_bias
        else:
            self.up_proj, self.up_proj_bias = experts.w1, experts.w1_bias


register()

"""Tiny random models of transformers' families of mixtures, one per way that experts are stored.

Letters: T tokens, H model width, E experts, K experts per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

_WIDTHS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROPE_HEADS = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


@dataclass(frozen=True)
class Family:
    """A model type of transformers, with the settings that make it small."""

    name: str
    about: str
    """What its experts are that others' are not."""
    settings: dict[str, Any] = field(default_factory=dict)
    edges: dict[str, Any] = field(default_factory=dict)
    """More settings for the experts alone: limits that numbers of order one reach. In a whole model
    roundings before the experts would decide who is beyond one, each time an error of order one."""

    whole: bool = True
    """Whether whole models are compared, too. Not where layers make a rounding grow until the error
    is that of a few elements, to which the bounds for many do not apply."""

    def experts(self, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
        """The experts of a random model with these edges."""
        with_edges = replace(self, settings=self.settings | self.edges)
        return experts_of(with_edges.model(dtype, device, seed))[0]

    def model(self, dtype: torch.dtype, device: torch.device, seed: int) -> nn.Module:
        """A random model in evaluation mode, with logits and routing of order one."""
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        config = CONFIG_MAPPING[self.name](**_WIDTHS | self.settings)
        with torch.random.fork_rng(devices=[]):  # written over
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, experts_implementation="eager", dtype=torch.float64
            )
        rng = torch.Generator().manual_seed(seed)
        stacked = {
            parameter: module
            for module in experts_of(model)
            for parameter in module.parameters(recurse=False)
        }
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim < 2:
                    continue
                scale = parameter.shape[-1] ** -0.5
                if parameter in stacked:
                    scale = _fan_in(stacked[parameter], parameter) ** -0.5
                drawn = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
                parameter.copy_(drawn * scale)
        return model.to(device, dtype).eval()


def _fan_in(experts: Any, parameter: Tensor) -> int:
    """1 of a bias, whose numbers are of order one too."""
    if parameter.ndim < 3:
        return 1
    return parameter.shape[1 if experts.is_transposed else 2]


def experts_of(model: nn.Module) -> list[Any]:
    """The modules whose implementation transformers lets choose."""
    return [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]


@contextmanager
def recorded_routing(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the experts (T, K) that every call of a mixture was given are collected."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(inputs[1] if len(inputs) > 1 else kwargs["top_k_index"])

    hooks = [
        module.register_forward_pre_hook(keep, with_kwargs=True) for module in experts_of(model)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


FAMILIES = (
    Family(
        "mixtral",
        "SwiGLU, stored (out, in)",
        {"num_local_experts": 4, "intermediate_size": 24},
    ),
    Family("olmoe", "weights that do not sum to 1", {"num_experts": 4, "intermediate_size": 24}),
    Family(
        "qwen2_moe",
        "a shared expert beside them",
        {
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 16,
            "intermediate_size": 24,
        },
    ),
    Family(
        "qwen3_moe",
        "narrow experts",
        {"num_experts": 4, "moe_intermediate_size": 12, "intermediate_size": 24, "head_dim": 8},
    ),
    Family(
        "deepseek_v2",
        "shared experts, latent attention",
        _ROPE_HEADS | {"n_routed_experts": 4, "moe_intermediate_size": 24, "intermediate_size": 24},
    ),
    Family(
        "deepseek_v3",
        "sigmoid routing in groups",
        _ROPE_HEADS
        | {
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "moe_intermediate_size": 24,
            "intermediate_size": 24,
        },
    ),
    Family(
        "deepseek_v4",
        "a gate with limits",
        {
            "num_local_experts": 4,
            "n_routed_experts": 4,
            "moe_intermediate_size": 24,
            "head_dim": 16,
        },
        {"swiglu_limit": 1.0},
    ),
    Family(
        "gpt_oss",
        "stored (in, out), biases, gate and up interleaved, limits",
        {"num_local_experts": 4, "intermediate_size": 24, "head_dim": 8},
        {"swiglu_limit": 1.0},
    ),
    Family("phimoe", "sparse mixer", {"num_local_experts": 4, "intermediate_size": 24}),
    Family(
        "glm4_moe",
        "sigmoid routing",
        {
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "moe_intermediate_size": 24,
            "intermediate_size": 24,
            "head_dim": 8,
        },
    ),
    Family("granitemoe", "scaled residuals", {"num_local_experts": 4, "intermediate_size": 24}),
    Family(
        "ernie4_5_moe",
        "a correction of the scores",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "intermediate_size": 24},
    ),
    Family(
        "nemotron_h",
        "squared ReLU without a gate",
        {
            "n_routed_experts": 4,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 16,
            "intermediate_size": 24,
            "head_dim": 8,
            "layers_block_type": ["moe", "attention", "moe"],
            "num_hidden_layers": 3,
        },
    ),
    Family(
        "jamba",
        "between state-space layers",
        {
            "num_experts": 4,
            "intermediate_size": 24,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "attn_layer_period": 2,
            "attn_layer_offset": 0,
        },
        whole=False,
    ),
    Family("minimax", "lightning attention", {"num_local_experts": 4, "intermediate_size": 24}),
    Family("flex_olmo", "experts of several owners", {"num_experts": 4, "intermediate_size": 24}),
)
"""Those that the certificate is made of."""

"""Mixtures as models of transformers' own, which load where this package is not installed.

Letters: E experts, H model width, F expert width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe_emergence.models.llama import (
    MixtureForCausalLM,
    MoELlamaForCausalLM,
    MoEMistralForCausalLM,
    MoEQwen3ForCausalLM,
)
from moe_emergence.moe import MoELayer, TopKRouter

_SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "rope_parameters", "attention_dropout", "tie_word_embeddings", "bos_token_id", "eos_token_id",
    "pad_token_id", "num_experts_per_tok",
)  # fmt: skip


@torch.no_grad()
def to_transformers(model: PreTrainedModel) -> PreTrainedModel:
    """The mixture with the same logits as a stock model: its copy, in its dtype.

    A Llama or Mistral becomes a `MixtralForCausalLM`; there every layer is a mixture, so a dense
    layer becomes one of E equal experts. A Qwen3 becomes a `Qwen3MoeForCausalLM`. Both renormalise
    the weights of the chosen experts as this package does; a top-1 expert has weight 1.

    Raises:
        ValueError: for a mixture that they cannot be: of another family, with biases in attention,
            with a hash router, a balancing bias, or a top-1 weight that is the probability.
    """
    reason = _obstacle(model)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot be exported: {reason}")
    assert isinstance(model, MixtureForCausalLM)
    config: Any = model.config
    shared = {name: getattr(config, name) for name in _SHARED}
    stock: Any
    if isinstance(model, MoEQwen3ForCausalLM):
        dense = [i for i in range(config.num_hidden_layers) if i not in config.moe_layers]
        stock = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **shared, num_experts=config.num_experts, mlp_only_layers=dense,
                intermediate_size=config.intermediate_size, decoder_sparse_step=1,
                moe_intermediate_size=config.intermediate_size, norm_topk_prob=True,
            )
        )  # fmt: skip
    else:
        stock = MixtralForCausalLM(
            MixtralConfig(
                **shared, num_local_experts=config.num_experts,
                intermediate_size=config.intermediate_size,
                sliding_window=getattr(config, "sliding_window", None),
            )
        )  # fmt: skip
    stock = nn.Module.to(stock, model.dtype)
    theirs = stock.state_dict()
    ours = {name: tensor for name, tensor in model.state_dict().items() if name in theirs}
    for index, block in enumerate(model.model.layers):
        if f"model.layers.{index}.mlp.gate.weight" in theirs:
            ours |= _mixture(block.mlp, config, f"model.layers.{index}.mlp.")
    stock.load_state_dict(ours)
    return stock.train(model.training)


def _mixture(mlp: Any, config: Any, prefix: str) -> dict[str, Tensor]:
    """Router and experts of a layer by transformers' names: (E, 2F, H) and (E, H, F)."""
    if isinstance(mlp, MoELayer):
        assert isinstance(mlp.router, TopKRouter)
        gate_EH = mlp.router.weight
        up, down = mlp.experts.w1.transpose(1, 2), mlp.experts.w2.transpose(1, 2)
    else:
        experts = config.num_experts
        gate_EH = mlp.gate_proj.weight.new_zeros(experts, config.hidden_size)
        up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).expand(experts, -1, -1)
        down = mlp.down_proj.weight.expand(experts, -1, -1)
    return {
        f"{prefix}gate.weight": gate_EH,
        f"{prefix}experts.gate_up_proj": up,
        f"{prefix}experts.down_proj": down,
    }


def _obstacle(model: Any) -> str | None:
    families = (MoELlamaForCausalLM, MoEMistralForCausalLM, MoEQwen3ForCausalLM)
    if not isinstance(model, families):
        return "only mixtures of Llama, Mistral and Qwen3 have a counterpart in transformers"
    config: Any = model.config
    if getattr(config, "attention_bias", False):
        return "attention_bias: Mixtral's and Qwen3-MoE's attention has none"
    if config.router == "hash":
        return "a hash router has no counterpart in transformers"
    if config.pool_size:
        return "pool_size: their routers choose among all experts"
    if config.use_expert_bias:
        return "use_expert_bias: their routers have no balancing bias"
    if config.num_experts_per_tok == 1 and config.top1_weight == "probability":
        return "top1_weight probability: theirs is 1 for a single expert"
    return None

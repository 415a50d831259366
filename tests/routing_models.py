"""Tiny mixtures with random weights: of this library and of four Hugging Face families."""

from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe_emergence.models import MoEGPT2Config, MoEGPT2LMHeadModel

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
OURS = ("learned", "frozen", "hash")
FAMILIES = ("mixtral", "olmoe", "qwen3_moe", "gpt_oss", "deepseek_v3")


def tiny_mixture(family: str, seed: int = 0) -> Any:
    """A model of 2 layers with 4 experts, 2 per token; routers far from uniform."""
    torch.manual_seed(seed)
    model = _build(family).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5 if "embed" in name else 0.2)
    return model


def _build(family: str) -> Any:
    if family in OURS:
        return MoEGPT2LMHeadModel(
            MoEGPT2Config(
                vocab_size=300, n_positions=32, n_embd=16, n_layer=3, n_head=2, moe_layers=[1, 2],
                num_experts=4, num_experts_per_tok=2, router=family,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        )  # fmt: skip
    if family == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4))
    if family == "olmoe":
        return OlmoeForCausalLM(OlmoeConfig(**SHAPE, num_experts=4))
    if family == "qwen3_moe":
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SHAPE, num_experts=4, moe_intermediate_size=8, decoder_sparse_step=1)
        )
    if family == "gpt_oss":
        return GptOssForCausalLM(GptOssConfig(**SHAPE, num_local_experts=4))
    shape = {name: value for name, value in SHAPE.items() if name != "head_dim"}
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **shape, n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=8,
            first_k_dense_replace=1, n_group=2, topk_group=2, q_lora_rank=8, kv_lora_rank=8,
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        )
    )  # fmt: skip

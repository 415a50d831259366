"""Small dense models of Llama's class and mixtures made from them, which decide clearly."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from moe_emergence.models import upcycle

VOCAB = 64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 48,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
DENSE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama-untied": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "head_dim": 8}),
    "mistral-window": (MistralConfig, MistralForCausalLM, {"sliding_window": 6}),
    "qwen2-window": (
        Qwen2Config, Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
}  # fmt: skip


def make_dense(kind: str, **changes: Any) -> Any:
    config, model_class, settings = DENSE[kind]
    torch.manual_seed(0)
    model = model_class(config(**{**SHAPE, **settings, **changes})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def make_mixture(kind: str, top_k: int = 1, **options: Any) -> Any:
    """Experts that differ, routers that decide."""
    model = upcycle(make_dense(kind), [1, 3], 4, top_k, **{"noise": 0.3, **options})
    with torch.no_grad():
        for layer in model.moe_layers().values():
            for parameter in layer.router.parameters():
                parameter.mul_(20)
    return model


def ids(batch: int = 3, length: int = 14, seed: int = 5) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))

"""Operators that are faster on some devices and compute the same up to rounding.

Letters: B sequences, A attention heads, L tokens in a sequence, D width of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from moe_emergence.models.loading import LanguageModel

_BLOCK = 128
"""Queries that attend at a time."""


def use_fast_operators(model: LanguageModel, device: torch.device, precision: str) -> None:
    """Replace operators of `model` in place; its parameters and its saved form stay as they are.

    GPT-2's GELU becomes one operator instead of eight. Where products are in bf16 on a CPU,
    attention is computed in blocks of queries: torch's fused attention computes in fp32 there.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    if device.type == "cpu" and precision == "bf16":
        model.config._attn_implementation = "causal_blocks"


def causal_attention(q_BALD: Tensor, k_BALD: Tensor, v_BALD: Tensor, scaling: float) -> Tensor:
    """Causal attention (B, A, L, D) as matrix products; weights in at least fp32.

    A block of queries reads no keys after its last, which is half of all there are.
    """
    length = q_BALD.shape[2]
    wide = torch.promote_types(q_BALD.dtype, torch.float32)
    q_BALD = q_BALD * scaling
    future = torch.ones(_BLOCK, _BLOCK, dtype=torch.bool, device=q_BALD.device).triu(1)
    outputs = []
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        scores = q_BALD[:, :, start:end] @ k_BALD[:, :, :end].transpose(2, 3)
        scores[..., start:].masked_fill_(future[: end - start, : end - start], float("-inf"))
        weights = torch.softmax(scores, dim=-1, dtype=wide).to(v_BALD.dtype)
        outputs.append(weights @ v_BALD[:, :, :end])
    return torch.cat(outputs, dim=2)


def _causal_blocks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`causal_attention` as transformers calls it; what it does not cover goes to torch's own."""
    if attention_mask is not None or dropout or query.shape[1:3] != key.shape[1:3]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal_attention(query, key, value, scaling).transpose(1, 2), None


FULL_BLOCKS = "full_blocks"
"""Name of torch's own attention for blocks without padding: with no masks registered under it,
transformers makes none."""

AttentionInterface.register(FULL_BLOCKS, sdpa_attention_forward)
AttentionInterface.register("causal_blocks", _causal_blocks)
AttentionMaskInterface.register("causal_blocks", sdpa_mask)

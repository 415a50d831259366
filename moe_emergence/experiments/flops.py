"""Training FLOPs of a configuration, counted as products: a multiplication and an addition are two.

A forward pass costs what its matrix products cost; the backward pass twice that. Attention counts
every pair of positions, as the kernels compute them. Embeddings, norms and element-wise work are
left out (arXiv 2001.08361, section 2.1, leaves out the same), and so are frozen layers, whose
forward pass is done once for a text.

Letters: H model width, L tokens in a sequence, E experts, K experts per token.
"""

import math
from dataclasses import dataclass

from transformers import GPT2Config, PreTrainedConfig

from moe_emergence.config import RunConfig
from moe_emergence.models.loading import dense_config
from moe_emergence.training.trainer import tokens_per_step

GPT2_VOCABULARY = 50_257


def base_config(config: RunConfig) -> PreTrainedConfig:
    """Of the dense model that a run starts from."""
    data = config.data
    vocab_size = data.vocab_size if data.tokenizer == "train" else GPT2_VOCABULARY
    return dense_config(config.model, vocab_size, data.block_size, data.cache_dir)


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of a token's forward pass through the parts of a dense model."""

    projections: int
    """Queries, keys, values and output of one layer's attention."""
    scores: int
    """Of one layer's attention, with all positions of a sequence."""
    mlp: int
    """Of one layer."""
    head: int


def token_flops(base: PreTrainedConfig, block_size: int) -> TokenFlops:
    """Of a dense model of this configuration, in sequences of `block_size` tokens."""
    width, heads = base.hidden_size, base.num_attention_heads
    head_width = getattr(base, "head_dim", None) or width // heads
    key_heads = getattr(base, "num_key_value_heads", None) or heads
    return TokenFlops(
        projections=4 * width * head_width * (heads + key_heads),
        scores=4 * block_size * heads * head_width,
        mlp=(2 if isinstance(base, GPT2Config) else 3) * 2 * width * expert_width(base),
        head=2 * width * base.vocab_size,
    )


def expert_width(base: PreTrainedConfig) -> int:
    """F: the inner width of the dense model's MLP, which its experts are copies of."""
    if isinstance(base, GPT2Config):
        return base.n_inner or 4 * base.hidden_size
    return base.intermediate_size


def training_flops_per_token(config: RunConfig) -> float:
    """FLOPs of forward and backward per token."""
    model, base = config.model, base_config(config)
    flops = token_flops(base, config.data.block_size)
    layers, mixtures = base.num_hidden_layers - model.frozen_layers, len(model.moe_layers)
    dense = layers - mixtures
    forward = layers * (flops.projections + flops.scores)
    forward += (dense + mixtures * model.top_k) * flops.mlp
    router = 0 if model.router == "hash" else mixtures * 2 * base.hidden_size * model.num_experts
    # no gradients of weights that are not trained
    head_is_frozen = model.frozen_layers and base.tie_word_embeddings
    head = (2 if head_is_frozen else 3) * flops.head
    return 3 * forward + head + (1 if model.router == "frozen" else 3) * router


def training_flops(config: RunConfig) -> float:
    """FLOPs of all steps of a run on one process."""
    tokens = config.optim.max_steps * tokens_per_step(config, 1)
    return tokens * training_flops_per_token(config)


def steps_for(flops: float, config: RunConfig) -> int:
    """Steps of `config` that cost nearest to `flops`, at least one."""
    per_step = tokens_per_step(config, 1) * training_flops_per_token(config)
    return max(1, math.floor(flops / per_step + 0.5))

"""Training FLOPs of a configuration, counted as products: a multiplication and an addition are two.

A forward pass costs what its matrix products cost; the backward pass twice that. Attention counts
every pair of positions, as the kernels compute them. Embeddings, norms and element-wise work are
left out (arXiv 2001.08361, section 2.1, leaves out the same).

Letters: H model width, V vocabulary, L tokens in a sequence, E experts, K experts per token.
"""

import math

from moe_emergence.config import RunConfig
from moe_emergence.training.trainer import tokens_per_step


def training_flops_per_token(config: RunConfig, vocab_size: int) -> float:
    """FLOPs of forward and backward per token.

    Args:
        config: of the run; `model.n_layer` and `model.n_embd` are those of its base.
        vocab_size: V.
    """
    model, width = config.model, config.model.n_embd
    attention = 2 * 4 * width**2 + 4 * config.data.block_size * width
    mlp = 2 * 8 * width**2
    mixtures = len(model.moe_layers)
    dense = model.n_layer - mixtures
    forward = model.n_layer * attention + (dense + mixtures * model.top_k) * mlp
    forward += 2 * width * vocab_size
    router = 0 if model.router == "hash" else mixtures * 2 * width * model.num_experts
    # a frozen router has no backward pass
    return 3 * forward + (1 if model.router == "frozen" else 3) * router


def training_flops(config: RunConfig, vocab_size: int) -> float:
    """FLOPs of all steps of a run on one process."""
    tokens = config.optim.max_steps * tokens_per_step(config, 1)
    return tokens * training_flops_per_token(config, vocab_size)


def steps_for(flops: float, config: RunConfig, vocab_size: int) -> int:
    """Steps of `config` that cost nearest to `flops`, at least one."""
    per_step = tokens_per_step(config, 1) * training_flops_per_token(config, vocab_size)
    return max(1, math.floor(flops / per_step + 0.5))

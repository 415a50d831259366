"""The sizes of a run's model and batch that decide what a step computes, moves and keeps.

Letters: T tokens of a rank in one pass, H model width, F expert width, P pre-activation width,
E experts, K experts per token.
"""

from dataclasses import dataclass

from transformers import GPT2Config

from emergence_kernels.activations import Activation, pre_activation_width
from moe_emergence.config import RunConfig
from moe_emergence.experiments.flops import base_config, expert_width, token_flops


@dataclass(frozen=True)
class ModelShape:
    """A model with mixture layers, and how much of it a rank is given at once."""

    hidden: int
    width: int
    experts: int
    top_k: int
    activation: Activation
    mixture_layers: int
    dense_layers: int
    """The others that are trained."""
    tokens: int
    """T."""
    passes: int
    """Forward and backward passes of a rank in an optimizer step."""
    attention_weights: int
    """Of one layer."""
    score_flops: int
    """Of one token in one layer's attention, forward, besides its weights' products."""
    vocabulary: int
    tied: bool
    """Whether embeddings and head are one matrix."""

    @property
    def pre_width(self) -> int:
        """P."""
        return pre_activation_width(self.activation, self.width)

    @property
    def mlp_weights(self) -> int:
        """Of an expert, or of a dense layer's MLP; biases are left out."""
        return self.hidden * (self.pre_width + self.width)

    @property
    def end_weights(self) -> int:
        """Of embeddings and head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def weights(self) -> int:
        """Of the model."""
        dense = self.attention_weights + self.mlp_weights
        mixture = self.attention_weights + self.experts * (self.mlp_weights + self.hidden)
        return self.dense_layers * dense + self.mixture_layers * mixture + self.end_weights


def shape_of(config: RunConfig) -> ModelShape:
    """The shape of a run, with a learned router whatever its router is.

    Raises:
        ValueError: when the base that it starts from cannot be found.
    """
    model, optim, base = config.model, config.optim, base_config(config)
    flops = token_flops(base, config.data.block_size)
    tokens = optim.batch_size * config.data.block_size
    passes = optim.grad_accum_steps
    if optim.balance_scope == "global":
        tokens, passes = tokens * passes, 1
    mixtures = len(model.moe_layers)
    return ModelShape(
        hidden=base.hidden_size,
        width=expert_width(base),
        experts=model.num_experts,
        top_k=model.top_k,
        activation="gelu_tanh" if isinstance(base, GPT2Config) else "swiglu",
        mixture_layers=mixtures,
        dense_layers=base.num_hidden_layers - model.frozen_layers - mixtures,
        tokens=tokens,
        passes=passes,
        attention_weights=flops.projections // 2,
        score_flops=flops.scores,
        vocabulary=base.vocab_size,
        tied=base.tie_word_embeddings,
    )

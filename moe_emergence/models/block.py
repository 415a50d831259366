"""What a layer of GPT-2 with mixtures is.

Letters: B sequences, L tokens each, H model width.
"""

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention

from moe_emergence.models.configuration import MoEGPT2Config
from moe_emergence.models.mixture import mixture_layer, run_mixture
from moe_emergence.moe import MoELayer, RouterDecision, RouterNoise


class MoEGPT2Block(GradientCheckpointingLayer):
    """GPT-2's block; its MLP is dense or a mixture of experts."""

    def __init__(self, config: MoEGPT2Config, layer_idx: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.n_inner or 4 * config.hidden_size
        self.layer_idx = layer_idx
        self.ln_1 = nn.LayerNorm(width, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, layer_idx=layer_idx)
        self.ln_2 = nn.LayerNorm(width, eps=config.layer_norm_epsilon)
        self.mlp: GPT2MLP | MoELayer
        # what wraps a layer later is no instance of its class
        self.is_moe = layer_idx in config.moe_layers
        self.pool_size = config.pool_size
        if self.is_moe:
            self.mlp = mixture_layer(config, width, inner, "gelu_tanh", layer_idx)
            self.dropout = nn.Dropout(config.resid_pdrop)
        else:
            self.mlp = GPT2MLP(inner, config)

    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        router_noise: RouterNoise | None = None,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, RouterDecision | None]:
        """Hidden states (B, L, H), and the decision of a mixture layer."""
        attended, _ = self.attn(
            self.ln_1(hidden_states),
            cache=cache,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
        hidden_states = hidden_states + attended
        if not self.is_moe:
            return hidden_states + self.mlp(self.ln_2(hidden_states)), None
        normed = self.ln_2(hidden_states)
        mixed, decision = run_mixture(self, normed, router_noise, token_ids, cache)
        return hidden_states + self.dropout(mixed), decision

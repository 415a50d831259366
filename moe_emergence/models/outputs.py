"""What models with mixture layers return.

Letters: B sequences, L tokens each, H model width.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from moe_emergence.moe import RouterDecision


@dataclass
class MoEModelOutput(BaseModelOutputWithPast):
    """Hidden states (B, L, H), the cache, and one `RouterDecision` per mixture layer."""

    router_decisions: tuple[RouterDecision, ...] | None = None


@dataclass
class MoECausalLMOutput(CausalLMOutputWithPast):
    """Logits, the cache and losses.

    With labels, `loss` is `lm_loss + lb_coef * lb_loss + z_coef * z_loss - variance_coef *
    routing_variance`, the last of them None where its weight is 0; compare models on `lm_loss`.
    `router_decisions` holds one decision per mixture layer, over the B*L tokens.
    """

    lm_loss: Tensor | None = None
    lb_loss: Tensor | None = None
    z_loss: Tensor | None = None
    routing_variance: Tensor | None = None
    router_decisions: tuple[RouterDecision, ...] | None = None

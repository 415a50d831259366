"""Dispatch through sorted rows: permute by expert, two grouped products, combine.

Letters: T tokens, H model width, F expert width, E experts, K experts per token, S = T*K rows.
"""

from torch import Tensor

from emergence_kernels import expert_mlp, sort_by_expert
from moe_emergence.moe.experts import Experts
from moe_emergence.moe.routing import RouterDecision


class FusedDispatcher:
    """All experts in one operator with its own backward; any device, any float dtype."""

    def __call__(self, x_TH: Tensor, decision: RouterDecision, experts: Experts) -> Tensor:
        """Weighted sum (T, H) of every token's experts."""
        permutation = sort_by_expert(decision.topk_experts, experts.num_experts)
        return expert_mlp(
            x_TH,
            decision.topk_weights,
            experts.w1,
            experts.b1,
            experts.w2,
            experts.b2,
            permutation,
            experts.activation,
        )

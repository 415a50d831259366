"""Dispatch through sorted rows: permute by expert, two grouped products, combine.

Letters: T tokens, H model width, F expert width, E experts, K experts per token, S = T*K rows.
"""

from torch import Tensor

from emergence_kernels import expert_mlp, sort_by_expert
from moe_emergence.moe.experts import Experts
from moe_emergence.moe.tuning import TuningTable


class FusedDispatcher:
    """All experts in one operator with its own backward; any device, any float dtype.

    With a `table` the kernels run in the configurations that were measured for their shape.
    """

    def __init__(self, table: TuningTable | None = None) -> None:
        self.table = table

    def __call__(
        self, x_TH: Tensor, topk_experts: Tensor, topk_weights: Tensor, experts: Experts
    ) -> Tensor:
        """Weighted sum (T, H) of every token's experts."""
        top_k = topk_experts.shape[1]
        return expert_mlp(
            x_TH,
            topk_weights,
            experts.w1,
            experts.w1_bias,
            experts.w2,
            experts.w2_bias,
            sort_by_expert(topk_experts, experts.num_experts),
            experts.activation,
            None if self.table is None else self.table.plan(x_TH, top_k, experts),
        )

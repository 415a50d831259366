"""Dispatch through MegaBlocks' permutation kernels (arXiv 2211.15841), where it is installed.

Letters: T tokens, H model width, K experts per token, S = T*K rows sorted by expert.
"""

import importlib
from types import ModuleType

from torch import Tensor

from emergence_kernels import sort_by_expert
from moe_emergence.moe.experts import Experts
from moe_emergence.moe.grouped import grouped_experts
from moe_emergence.moe.routing import RouterDecision

_INSTALL = (
    "pip install --no-deps --no-build-isolation megablocks stanford-stk (it builds a CUDA "
    "extension and needs nvcc), or use --dispatch fused"
)


class MegaBlocksDispatcher:
    """MegaBlocks gathers and scatters the rows; PyTorch's grouped product runs the experts.

    Raises:
        ValueError: when MegaBlocks cannot be imported, saying what to install.
    """

    def __init__(self) -> None:
        try:
            self.ops: ModuleType = importlib.import_module("megablocks.ops")
        except ImportError as error:
            raise ValueError(
                f"--dispatch megablocks: MegaBlocks cannot be imported ({error}); {_INSTALL}"
            ) from error

    def __call__(self, x_TH: Tensor, decision: RouterDecision, experts: Experts) -> Tensor:
        """Weighted sum (T, H) of every token's experts."""
        top_k = decision.topk_experts.shape[1]
        permutation = sort_by_expert(decision.topk_experts, experts.num_experts)
        sorted_experts_S = decision.topk_experts.reshape(-1)[permutation.perm]
        indices_S, bin_ids_S = permutation.perm.int(), sorted_experts_S.int()
        bins_E = permutation.expert_offsets[1:].contiguous()
        rows_SH = self.ops.gather(x_TH, indices_S, bin_ids_S, bins_E, top_k)
        out_SH = grouped_experts(rows_SH, sorted_experts_S, permutation.expert_offsets, experts)
        weights_S = decision.topk_weights.reshape(-1)
        y_TH: Tensor = self.ops.scatter(out_SH, indices_S, bin_ids_S, weights_S, bins_E, top_k)
        return y_TH.to(out_SH.dtype)

"""Dispatch through MegaBlocks' permutation kernels (arXiv 2211.15841), where it is installed.

Letters: T tokens, H model width, K experts per token, S = T*K rows sorted by expert.
"""

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from emergence_kernels import sort_by_expert
from moe_emergence.moe.experts import Experts
from moe_emergence.moe.grouped import grouped_experts, torch_grouped_mm

_INSTALL = (
    "pip install --no-deps --no-build-isolation megablocks stanford-stk (it builds a CUDA "
    "extension and needs nvcc), or use dispatch fused"
)


class MegaBlocksDispatcher:
    """MegaBlocks gathers and scatters the rows; the experts run through the product of its grouped
    MLP where the package `grouped_gemm` is installed, and through PyTorch's otherwise.

    Raises:
        ValueError: when MegaBlocks cannot be imported, saying what to install.
    """

    def __init__(self) -> None:
        try:
            self.ops: ModuleType = importlib.import_module("megablocks.ops")
        except ImportError as error:
            raise ValueError(
                f"dispatch megablocks: MegaBlocks cannot be imported ({error}); {_INSTALL}"
            ) from error
        self.gmm: ModuleType | None = None
        if importlib.util.find_spec("grouped_gemm") is not None:
            self.gmm = importlib.import_module("grouped_gemm.ops")

    def __call__(
        self, x_TH: Tensor, topk_experts: Tensor, topk_weights: Tensor, experts: Experts
    ) -> Tensor:
        """Weighted sum (T, H) of every token's experts."""
        top_k = topk_experts.shape[1]
        permutation = sort_by_expert(topk_experts, experts.num_experts)
        sorted_experts_S = topk_experts.reshape(-1)[permutation.perm]
        indices_S, bin_ids_S = permutation.perm.int(), sorted_experts_S.int()
        bins_E = permutation.expert_offsets[1:].contiguous()
        rows_SH = self.ops.gather(x_TH, indices_S, bin_ids_S, bins_E, top_k)
        out_SH = grouped_experts(
            rows_SH, sorted_experts_S, permutation.expert_offsets, experts, self._product
        )
        weights_S = topk_weights.reshape(-1)
        y_TH: Tensor = self.ops.scatter(out_SH, indices_S, bin_ids_S, weights_S, bins_E, top_k)
        return y_TH.to(out_SH.dtype)

    def _product(self, rows_SI: Tensor, w_EIO: Tensor, expert_offsets: Tensor) -> Tensor:
        # grouped_gemm takes bf16 only, and group sizes on the host: one synchronisation
        if self.gmm is None or rows_SI.dtype != torch.bfloat16:
            return torch_grouped_mm(rows_SI, w_EIO, expert_offsets)
        sizes_E = expert_offsets.diff().to("cpu", torch.int64)
        y_SO: Tensor = self.gmm.gmm(rows_SI, w_EIO, sizes_E)
        return y_SO

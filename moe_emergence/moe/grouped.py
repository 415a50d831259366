"""Dispatch through `torch.nn.functional.grouped_mm`, differentiated by autograd.

What PyTorch offers out of the box, kept as a peer to measure against.
Letters: T tokens, H model width, F expert width, P pre-activation width, E experts,
K experts per token, S = T*K rows sorted by expert.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from emergence_kernels import sort_by_expert
from emergence_kernels.activations import activate
from moe_emergence.moe.experts import Experts


class GroupedDispatcher:
    """Permute, two grouped products, combine; fp32, bf16 and fp16, rows of whole 16 bytes."""

    def __call__(
        self, x_TH: Tensor, topk_experts: Tensor, topk_weights: Tensor, experts: Experts
    ) -> Tensor:
        """Weighted sum (T, H) of every token's experts."""
        permutation = sort_by_expert(topk_experts, experts.num_experts)
        sorted_experts_S = topk_experts.reshape(-1)[permutation.perm]
        tokens, top_k = topk_experts.shape
        # repeated, then permuted: the backward of a gather with repeated rows adds in any order
        rows_SH = x_TH.unsqueeze(1).expand(-1, top_k, -1).reshape(-1, x_TH.shape[1])
        out_SH = grouped_experts(
            rows_SH[permutation.perm], sorted_experts_S, permutation.expert_offsets, experts
        )
        out_TKH = out_SH[permutation.inv_perm].view(tokens, top_k, out_SH.shape[1])
        return (out_TKH * topk_weights.unsqueeze(-1)).sum(dim=1).to(out_SH.dtype)


GroupedProduct = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(S, I) sorted rows, (E, I, O) weights, (E+1,) int32 first row of every expert: (S, O)."""


def torch_grouped_mm(rows_SI: Tensor, w_EIO: Tensor, expert_offsets: Tensor) -> Tensor:
    """PyTorch's own grouped product."""
    return functional.grouped_mm(rows_SI, w_EIO, offs=expert_offsets[1:])


def grouped_experts(
    rows_SH: Tensor,
    sorted_experts_S: Tensor,
    expert_offsets: Tensor,
    experts: Experts,
    product: GroupedProduct = torch_grouped_mm,
) -> Tensor:
    """Every row through its own expert: (S, H), in the autocast dtype under autocast.

    Raises:
        ValueError: for fp64 and for widths whose rows are not whole multiples of 16 bytes, which
            `grouped_mm` does not take.
    """
    dtype = rows_SH.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(rows_SH.device.type):
        dtype = torch.get_autocast_dtype(rows_SH.device.type)
    widths = (*experts.w1.shape[1:], *experts.w2.shape[1:])
    if dtype == torch.float64 or any(width * dtype.itemsize % 16 for width in widths):
        raise ValueError(
            f"dispatch grouped: torch's grouped_mm does not take {dtype} with widths {widths}; "
            "use dispatch fused"
        )
    # as a product, so that the biases' gradients are summed in fp32 and always in one order
    member_SE = functional.one_hot(sorted_experts_S, experts.num_experts).to(dtype)
    pre_SP = product(rows_SH.to(dtype), experts.w1.to(dtype), expert_offsets)
    if experts.w1_bias is not None:
        pre_SP = pre_SP + member_SE @ experts.w1_bias.to(dtype)
    act_SF = activate(pre_SP, experts.activation)
    out_SH = product(act_SF, experts.w2.to(dtype), expert_offsets)
    if experts.w2_bias is not None:
        out_SH = out_SH + member_SE @ experts.w2_bias.to(dtype)
    return out_SH

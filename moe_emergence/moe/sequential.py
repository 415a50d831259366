"""The definition of correct: one expert after another, in plain PyTorch.

Letters: T tokens, H model width, K experts per token, N tokens of one expert.
"""

import torch
from torch import Tensor

from emergence_kernels.activations import activate
from moe_emergence.moe.experts import Experts


class SequentialDispatcher:
    """Loop over the experts; every dispatcher must agree with this one in output and gradients."""

    def __call__(
        self, x_TH: Tensor, topk_experts: Tensor, topk_weights: Tensor, experts: Experts
    ) -> Tensor:
        """Weighted sum (T, H) of every token's experts, summed in at least fp32."""
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        y_TH = x_TH.new_zeros(x_TH.shape, dtype=wide)
        out_dtype = x_TH.dtype
        for e, (w1, b1, w2, b2) in enumerate(experts.unbind()):
            token_N, slot_N = torch.where(topk_experts == e)
            pre_NP = x_TH[token_N] @ w1
            pre_NP = pre_NP if b1 is None else pre_NP + b1.to(pre_NP.dtype)
            out_NH = activate(pre_NP, experts.activation) @ w2
            out_NH = out_NH if b2 is None else out_NH + b2.to(out_NH.dtype)
            weight_N1 = topk_weights[token_N, slot_N].unsqueeze(-1)
            # a token meets an expert at most once, so no two rows add to the same place
            y_TH = y_TH.index_add(0, token_N, out_NH.to(wide) * weight_N1.to(wide))
            out_dtype = out_NH.dtype
        return y_TH.to(out_dtype)

"""Plain-torch twins of the operators: the same signatures, written for reading, differentiated by
autograd. They define what the operators compute; they are not meant to be fast.

Letters: T tokens, H model width, F expert width, P pre-activation width (F, or 2F for SwiGLU),
E experts, K experts per token, S = T*K rows sorted by expert, I and O input and output width.
"""

import torch
from torch import Tensor

from .activations import Activation, activate
from .permutation import Permutation
from .routing import Routing


def sort_by_expert(topk_experts_TK: Tensor, num_experts: int) -> Permutation:
    """Twin of `permutation.sort_by_expert`, as lists."""
    top_k = topk_experts_TK.shape[1]
    flat = topk_experts_TK.reshape(-1).tolist()
    perm = [slot for e in range(num_experts) for slot, expert in enumerate(flat) if expert == e]
    inv_perm = [0] * len(flat)
    for row, slot in enumerate(perm):
        inv_perm[slot] = row
    offsets = [sum(expert < e for expert in flat) for e in range(num_experts + 1)]

    def integers(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=topk_experts_TK.device)

    return Permutation(
        integers(perm),
        integers(inv_perm),
        integers([slot // top_k for slot in perm]),
        integers(offsets, torch.int32),
    )


def route(
    logits_TE: Tensor,
    top_k: int,
    noise_TE: Tensor | None = None,
    expert_bias_E: Tensor | None = None,
) -> Routing:
    """Twin of `routing.route`."""
    probs_TE = logits_TE.softmax(dim=-1)
    noisy_TE = probs_TE if noise_TE is None else (logits_TE + noise_TE).softmax(dim=-1)
    scores_TE = noisy_TE.detach() if expert_bias_E is None else noisy_TE.detach() + expert_bias_E
    experts_TK = scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen_TK = noisy_TE.gather(-1, experts_TK)
    if top_k == 1:
        weights_TK = torch.ones_like(chosen_TK) + (chosen_TK - chosen_TK.detach())
    else:
        weights_TK = chosen_TK / chosen_TK.sum(dim=-1, keepdim=True)
    logsumexp_T = logits_TE.logsumexp(dim=-1)
    return Routing(
        probs_TE,
        noisy_TE,
        experts_TK,
        weights_TK,
        logsumexp_T,
        torch.stack([(experts_TK == e).sum() for e in range(logits_TE.shape[1])]),
        probs_TE.sum(dim=0),
        logsumexp_T.square().sum(),
    )


def grouped_gemm(
    x_SI: Tensor, w_EIO: Tensor, expert_offsets: Tensor, bias_EO: Tensor | None = None
) -> Tensor:
    """Twin of `grouped_gemm.grouped_gemm`."""
    bounds = expert_offsets.tolist()
    outputs = []
    for e, w_IO in enumerate(w_EIO.unbind()):
        y_IO = x_SI[bounds[e] : bounds[e + 1]] @ w_IO
        outputs.append(y_IO if bias_EO is None else y_IO + bias_EO[e])
    outputs.append(x_SI.new_zeros(len(x_SI) - bounds[-1], w_EIO.shape[2]))
    return torch.cat(outputs)


def expert_mlp(
    x_TH: Tensor,
    topk_weights_TK: Tensor,
    w1_EHP: Tensor,
    b1_EP: Tensor | None,
    w2_EFH: Tensor,
    b2_EH: Tensor | None,
    permutation: Permutation,
    activation: Activation,
) -> Tensor:
    """Twin of `expert_mlp.expert_mlp`."""
    offsets = permutation.expert_offsets
    pre_SP = grouped_gemm(x_TH[permutation.token_idx], w1_EHP, offsets, b1_EP)
    out_SH = grouped_gemm(activate(pre_SP, activation), w2_EFH, offsets, b2_EH)
    tokens, top_k = topk_weights_TK.shape
    out_TKH = out_SH[permutation.inv_perm].view(tokens, top_k, out_SH.shape[1])
    return (out_TKH * topk_weights_TK.unsqueeze(-1)).sum(dim=1).to(x_TH.dtype)

"""Auxiliary losses of a mixture of experts, as pure functions.

Letters: T tokens, E experts, K experts per token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_emergence.moe.routing import RouterDecision


def load_balancing_loss(
    router_probs_TE: Tensor,
    topk_experts_TK: Tensor,
    mask_T: Tensor | None = None,
    expert_fraction_E: Tensor | None = None,
) -> Tensor:
    """Balance loss of one layer: `E * sum_e f_e P_e` (Switch Transformer, arXiv 2101.03961, eq. 4).

    f_e is the share of the T*K assignments that went to expert e, a constant for the gradient;
    P_e the mean clean probability of e. Uniform routing gives 1.0 for every K, collapse gives E.

    Args:
        router_probs_TE: (T, E) clean probabilities.
        topk_experts_TK: (T, K) chosen experts.
        mask_T: (T,) true for tokens that count; padding is false.
        expert_fraction_E: (E,) f taken over a larger batch than these T tokens; the mean of the
            losses of equal parts of that batch is then the loss of the whole.

    Returns:
        Scalar; 0 when no token counts.
    """
    num_tokens, num_experts = router_probs_TE.shape
    keep_T1 = (
        router_probs_TE.new_ones(num_tokens, 1)
        if mask_T is None
        else mask_T.to(router_probs_TE)[:, None]
    )
    kept = keep_T1.sum().clamp(min=1)
    if expert_fraction_E is None:
        chosen_TKE = topk_experts_TK.unsqueeze(-1) == torch.arange(
            num_experts, device=topk_experts_TK.device
        )
        counts_E = (chosen_TKE.sum(dim=1) * keep_T1).sum(dim=0)
        expert_fraction_E = counts_E / (kept * topk_experts_TK.shape[1])
    mean_probs_E = (router_probs_TE * keep_T1).sum(dim=0) / kept
    return num_experts * (expert_fraction_E.to(mean_probs_E) * mean_probs_E).sum()


def router_z_loss(router_logits_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of `logsumexp(logits)^2` (ST-MoE, arXiv 2202.08906, eq. 5): scalar."""
    squared_T = router_logits_TE.logsumexp(dim=-1).square()
    if mask_T is None:
        return squared_T.sum() / max(squared_T.numel(), 1)
    keep_T = mask_T.to(squared_T)
    return (squared_T * keep_T).sum() / keep_T.sum().clamp(min=1)


def auxiliary_losses(
    decisions: Sequence[RouterDecision],
    mask_T: Tensor | None = None,
    expert_fractions: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Balance and z loss, each computed per layer and then averaged over the layers.

    Averaging losses instead of concatenating tokens keeps the imbalances of two layers from
    cancelling. `expert_fractions` holds one (E,) tensor per layer, see `load_balancing_loss`.
    """
    if not decisions:
        raise ValueError("auxiliary_losses needs the decisions of at least one layer")
    fractions: Sequence[Tensor | None] = expert_fractions or [None] * len(decisions)
    losses = [
        _losses_of(decision, mask_T, fraction)
        for decision, fraction in zip(decisions, fractions, strict=True)
    ]
    balance, z = zip(*losses, strict=True)
    return torch.stack(balance).mean(), torch.stack(z).mean()


def _losses_of(
    decision: RouterDecision, mask_T: Tensor | None, expert_fraction_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Balance and z loss of one layer; from the router's own sums where every token counts."""
    sums = decision.sums
    if mask_T is not None or sums is None:
        return (
            load_balancing_loss(
                decision.router_probs, decision.topk_experts, mask_T, expert_fraction_E
            ),
            router_z_loss(decision.router_logits, mask_T),
        )
    num_tokens, top_k = decision.topk_experts.shape
    tokens = max(num_tokens, 1)
    if expert_fraction_E is None:
        expert_fraction_E = sums.expert_counts_E / (tokens * top_k)
    fraction_E = expert_fraction_E.to(sums.prob_sums_E)
    balance = decision.num_experts / tokens * (fraction_E * sums.prob_sums_E).sum()
    return balance, sums.z_sum / tokens

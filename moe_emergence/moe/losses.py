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
    num_experts = router_probs_TE.shape[1]
    keep_T1 = _keep(mask_T, router_probs_TE)
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


def routing_variance(
    decisions: Sequence[RouterDecision],
    mask_T: Tensor | None = None,
    mean_probs: Sequence[Tensor] | None = None,
) -> Tensor:
    """How differently tokens are routed: the variance over tokens of an expert's clean probability.

    The mean over experts, then over layers. 0 where all tokens have the same probabilities, at most
    (E-1)/E^2, where every token is sure of its expert and the load is even. Taken off a loss it is
    the variance loss of arXiv 2505.22323.

    Args:
        decisions: one for each layer.
        mask_T: (T,) true for tokens that count.
        mean_probs: one (E,) tensor per layer, means over a larger batch than these tokens; then the
            mean over equal parts of that batch has the value and the gradient of the whole.

    Returns:
        Scalar; 0 when no token counts.
    """
    means: Sequence[Tensor | None] = mean_probs or [None] * len(decisions)
    variances = []
    for decision, mean_E in zip(decisions, means, strict=True):
        probs_TE = decision.router_probs
        keep_T1 = _keep(mask_T, probs_TE)
        kept = keep_T1.sum().clamp(min=1)
        if mean_E is None:
            mean_E = (probs_TE * keep_T1).sum(dim=0) / kept
        away_TE = (probs_TE - mean_E.to(probs_TE)) * keep_T1
        variances.append(away_TE.square().sum() / (kept * decision.num_experts))
    return torch.stack(variances).mean()


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


def _keep(mask_T: Tensor | None, probs_TE: Tensor) -> Tensor:
    """(T, 1): 1 for tokens that count, 0 for the others."""
    return torch.ones_like(probs_TE[:, :1]) if mask_T is None else mask_T.to(probs_TE)[:, None]

"""Routers: from hidden states to the experts of every token.

Letters: T tokens, H model width, E experts, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import register_dataclass

from emergence_kernels import route
from moe_emergence.moe.noise import RouterNoise, gaussian_noise, hash32
from moe_emergence.moe.pools import DocumentPools

RouterKind = Literal["learned", "frozen", "hash"]
Top1Weight = Literal["straight-through", "probability"]


@dataclass(frozen=True, eq=False)
class RouterSums:
    """Sums over all T tokens of a decision: all that the auxiliary losses need of it."""

    expert_counts_E: Tensor
    """(E,) int64: assignments."""
    prob_sums_E: Tensor
    """(E,) sums of the clean probabilities."""
    z_sum: Tensor
    """Scalar: sum of the squared logsumexps of the logits."""


@dataclass(frozen=True, eq=False)
class RouterDecision:
    """What a router decided for T tokens, and what the losses and metrics need to know about it."""

    router_logits: Tensor
    """(T, E) at least fp32, without noise."""
    router_probs: Tensor
    """(T, E) softmax of `router_logits`: the clean probabilities, for losses and entropies."""
    noisy_probs: Tensor
    """(T, E) softmax of the logits with noise: what the choice and its weights come from."""
    topk_experts: Tensor
    """(T, K) int64, best first, distinct within a token."""
    topk_weights: Tensor
    """(T, K): summing to 1 for K > 1; for top-1 straight-through 1, or the chosen probability."""
    sums: RouterSums | None = None
    """Where the router computed them on its way."""

    @property
    def num_experts(self) -> int:
        """E."""
        return self.router_probs.shape[1]

    def expert_counts(self, mask_T: Tensor | None = None) -> Tensor:
        """(E,) int64: assignments per expert, over the tokens where `mask_T` (T,) is true."""
        if mask_T is None and self.sums is not None:
            return self.sums.expert_counts_E
        chosen_TE = self.topk_experts.unsqueeze(-1) == torch.arange(
            self.num_experts, device=self.topk_experts.device
        )
        if mask_T is not None:
            chosen_TE = chosen_TE & mask_T.bool()[:, None, None]
        return chosen_TE.sum(dim=(0, 1))

    def entropy(self) -> Tensor:
        """Scalar: entropy of the clean probabilities in nats, averaged over tokens."""
        entropy_T = torch.special.entr(self.router_probs.detach()).sum(dim=-1)
        return entropy_T.sum() / max(entropy_T.numel(), 1)


# what PyTorch's tools take a model's output apart by
for _part in (RouterSums, RouterDecision):
    register_dataclass(_part)


class TopKRouter(nn.Module):
    """Linear router with softmax over experts and (optionally noisy) top-k selection.

    The router computes in fp32 whatever the autocast (fp64 for fp64 inputs). Noise is added only
    in training. A top-1 expert's output is weighted by 1, with the gradient of the chosen noisy
    probability, or with `top1_weight` "probability" by that probability (Switch Transformer,
    arXiv 2101.03961, equation 2). With `frozen` the weight is never trained and nothing flows back
    through the router: the null model of a learned one. `expert_bias` moves the selection only,
    never the weights (loss-free balancing, arXiv 2408.15664). With an `expert_bias_rate` the router
    moves it itself: at every training pass, by the assignments of the one before, over all
    processes. A trainer that counts whole steps sets the rate to 0 and calls `update_expert_bias`.
    With `pools` every token chooses among its document's experts, and probabilities and losses are
    of these.

    Raises:
        ValueError: if top_k is not in [1, num_experts].
    """

    weight: Tensor
    expert_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        frozen: bool = False,
        use_expert_bias: bool = False,
        expert_bias_rate: float = 0.0,
        top1_weight: Top1Weight = "straight-through",
        pools: DocumentPools | None = None,
    ) -> None:
        super().__init__()
        check_top_k(top_k, num_experts)
        self.weigh_by_probability = top_k == 1 and top1_weight == "probability"
        self.top_k = top_k
        self.pools = pools
        self.frozen = frozen
        weight_EH = torch.empty(num_experts, hidden_size)
        if frozen:
            # a buffer: no optimizer, no gradient and no loading code can make it trainable again
            self.register_buffer("weight", weight_EH)
        else:
            self.weight = nn.Parameter(weight_EH)
        # its steps are smaller than what is left of a larger value in 16 bits
        bias_E = torch.zeros(num_experts, dtype=torch.float32) if use_expert_bias else None
        self.register_buffer("expert_bias", bias_E)
        self.expert_bias_rate = expert_bias_rate
        self._counts_E: Tensor | None = None
        nn.init.normal_(self.weight, std=0.02)

    def forward(
        self, x_TH: Tensor, noise: RouterNoise | None = None, token_ids: Tensor | None = None
    ) -> RouterDecision:
        """Choose K experts for every row of `x_TH` (T, H).

        `token_ids` (..., L), T in all, is needed for pools only.
        """
        x_TH = x_TH.detach() if self.frozen else x_TH
        moves_bias = self._moves_bias()
        if moves_bias and self._counts_E is not None:
            self.update_expert_bias(_over_processes(self._counts_E), self.expert_bias_rate)
        with torch.autocast(x_TH.device.type, enabled=False):
            wide = torch.promote_types(x_TH.dtype, torch.float32)
            logits_TE = functional.linear(x_TH.to(wide), self.weight.to(wide))
            if self.pools is not None:
                if token_ids is None:
                    raise ValueError("pool_size: pass input_ids, not inputs_embeds")
                drawn = noise if self.training else None
                logits_TE = self.pools.limit(logits_TE, token_ids, drawn)
            deviates_TE = None
            if self.training and noise is not None and noise.is_on:
                deviates_TE = gaussian_noise(
                    noise, logits_TE.shape[0], logits_TE.shape[1], logits_TE.device
                )
            routing = route(logits_TE, self.top_k, deviates_TE, self.expert_bias)
            weights_TK = routing.weights_TK
            if self.weigh_by_probability:
                weights_TK = routing.noisy_probs_TE.gather(1, routing.experts_TK)
        if moves_bias:
            self._counts_E = routing.expert_counts_E
        return RouterDecision(
            logits_TE,
            routing.probs_TE,
            routing.noisy_probs_TE,
            routing.experts_TK,
            weights_TK,
            RouterSums(routing.expert_counts_E, routing.prob_sums_E, routing.z_sum),
        )

    def _moves_bias(self) -> bool:
        """Not where activations are computed again for backward, which has to route as before."""
        has_bias = self.expert_bias is not None and self.expert_bias_rate > 0
        if not (has_bias and self.training and torch.is_grad_enabled()):
            return False
        # a compiler traces the forward pass, and does not know the question
        return torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As every module's, but for the bias, which moves to other devices and stays in fp32."""
        before = self.expert_bias
        super()._apply(fn, recurse)
        after = self.expert_bias
        if before is not None and after is not None and after.dtype != torch.float32:
            self.expert_bias = before.to(after.device)
        return self

    @torch.no_grad()
    def update_expert_bias(self, expert_counts_E: Tensor, rate: float) -> None:
        """Raise the bias of experts below the mean load by `rate`, lower that of those above.

        arXiv 2408.15664, algorithm 1. `expert_counts_E` (E,) counts one optimizer step.
        """
        if self.expert_bias is None:
            raise ValueError("the router was built without use_expert_bias")
        load_E = expert_counts_E.to(self.expert_bias)
        self.expert_bias += rate * torch.sign(load_E.mean() - load_E)


def _over_processes(counts_E: Tensor) -> Tensor:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return counts_E
    counts_E = counts_E.clone()
    distributed.all_reduce(counts_E)
    return counts_E


class HashRouter(nn.Module):
    """Null model that routes by a hash of the token id alone (arXiv 2106.04426), with weights 1/K.

    It has no parameters; its logits are all zero and its probabilities uniform over the K experts.
    """

    def __init__(self, num_experts: int, top_k: int, *, layer: int = 0) -> None:
        super().__init__()
        check_top_k(top_k, num_experts)
        self.num_experts = num_experts
        self.top_k = top_k
        self.layer = layer

    def forward(
        self, x_TH: Tensor, noise: RouterNoise | None = None, token_ids: Tensor | None = None
    ) -> RouterDecision:
        """Choose K experts for every row of `x_TH` (T, H) from `token_ids`, T in all."""
        if token_ids is None:
            raise ValueError("the hash router needs token_ids: pass input_ids, not inputs_embeds")
        # the layer keys the hash, so that no two layers share a routing
        key = hash32(0x9E3779B9 ^ self.layer)
        hashed_T = hash32((token_ids.reshape(-1).long() ^ key) & 0xFFFFFFFF) >> 8
        slots_K = torch.arange(self.top_k, device=x_TH.device)
        experts_TK = (hashed_T[:, None] + slots_K) % self.num_experts
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        logits_TE = x_TH.new_zeros(x_TH.shape[0], self.num_experts, dtype=wide)
        weights_TK = x_TH.new_full(experts_TK.shape, 1.0 / self.top_k, dtype=wide)
        probs_TE = torch.zeros_like(logits_TE).scatter(1, experts_TK, weights_TK)
        return RouterDecision(logits_TE, probs_TE, probs_TE, experts_TK, weights_TK)


def check_top_k(top_k: int, num_experts: int) -> None:
    """Refuse a top_k outside [1, num_experts]."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k {top_k}: give a number from 1 to num_experts ({num_experts})")

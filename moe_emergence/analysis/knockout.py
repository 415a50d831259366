"""What a model loses without one of its experts: loss per domain, expert by expert.

Letters: T tokens, E experts, K experts per token.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from emergence_kernels import route
from moe_emergence.analysis.routers import RouterInfo, find_routers
from moe_emergence.config import DOMAINS
from moe_emergence.moe import RouterDecision
from moe_emergence.moe.routing import TopKRouter
from moe_emergence.progress import progress_bar

How = Literal["rerouted", "zeroed"]
ALL = "all"


def knockout_table(
    model: nn.Module, blocks: Mapping[str, Tensor], num_experts: int, *, batch_size: int = 8
) -> pd.DataFrame:
    """Loss per domain with each expert of each layer removed, one at a time.

    layer, expert, domain ("all" too), lm_loss, `increase` over the whole model on the same blocks,
    tokens, how: "rerouted" where the router can choose others (softmax routers of this library,
    E > K), else "zeroed": the expert adds nothing. Nats per token; weights are not touched.

    Args:
        model: any mixture language model whose routers can be read; its mode is restored.
        blocks: token ids (R, L) for domains in `DOMAINS`.
        num_experts: E.
        batch_size: blocks in one forward pass.
    """
    routers = find_routers(model)
    was_training = model.training
    model.eval()
    rows: list[dict[str, Any]] = []
    passes = 1 + len(routers) * num_experts
    try:
        with progress_bar("knocking out experts", passes) as advance:
            whole = domain_losses(model, blocks, batch_size)
            advance(1)
            for router in routers:
                how = how_removed(router)
                for expert in range(num_experts):
                    with without_expert(router, expert, how):
                        losses = domain_losses(model, blocks, batch_size)
                    rows += [
                        {
                            "layer": router.layer, "expert": expert, "domain": domain,
                            "lm_loss": loss, "increase": loss - whole[domain][0],
                            "tokens": tokens, "how": how,
                        }
                        for domain, (loss, tokens) in losses.items()
                    ]  # fmt: skip
                    advance(1)
    finally:
        model.train(was_training)
    return pd.DataFrame(rows)


@torch.no_grad()
def domain_losses(
    model: nn.Module, blocks: Mapping[str, Tensor], batch_size: int
) -> dict[str, tuple[float, int]]:
    """Next-token loss in nats and tokens predicted, per domain and of "all"."""
    device = next(model.parameters()).device
    sums: dict[str, tuple[float, int]] = {}
    for domain in DOMAINS:
        total, tokens = 0.0, 0
        for part in blocks.get(domain, torch.zeros(0, 1)).split(batch_size):
            ids = part.long().to(device)
            if not len(ids):
                continue
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            targets = ids[:, 1:].reshape(-1)
            flat = logits.reshape(-1, logits.shape[-1]).float()
            total += float(functional.cross_entropy(flat, targets, reduction="sum"))
            tokens += targets.numel()
        if tokens:
            sums[domain] = (total, tokens)
    sums[ALL] = (sum(s for s, _ in sums.values()), sum(n for _, n in sums.values()))
    return {domain: (total / max(n, 1), n) for domain, (total, n) in sums.items()}


def how_removed(router: RouterInfo) -> How:
    """Whether the router can choose another expert in place of one that is gone."""
    module = router.module
    if isinstance(module, TopKRouter) and module.weight.shape[0] > module.top_k:
        return "rerouted"
    return "zeroed"


@contextmanager
def without_expert(router: RouterInfo, expert: int, how: How) -> Iterator[None]:
    """The model without one expert of one layer, within the block."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if how == "rerouted":
            assert isinstance(module, TopKRouter)
            return _rerouted(module, output, expert)
        if isinstance(output, RouterDecision):
            kept = output.topk_experts != expert
            return replace(output, topk_weights=output.topk_weights * kept)
        *first, weights, experts = output
        return (*first, weights * (experts != expert), experts)

    handle = router.module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _rerouted(module: TopKRouter, decision: RouterDecision, expert: int) -> RouterDecision:
    # a finite number: log(0) times a probability of 0 would be NaN in the sums
    logits = decision.router_logits.clone()
    logits[:, expert] = -1e9
    routing = route(logits, module.top_k, None, module.expert_bias)
    weights = routing.weights_TK
    if module.weigh_by_probability:
        weights = routing.probs_TE.gather(1, routing.experts_TK)
    return RouterDecision(
        logits, routing.probs_TE, routing.noisy_probs_TE, routing.experts_TK, weights
    )

"""Route regret: how much lower a token's loss would have been with another expert.

Letters: R blocks, L tokens of a block, E experts, K experts per token, O = E - K + 1 options.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_emergence.analysis.ablation import Ablation, Floats
from moe_emergence.analysis.routers import RouterInfo, find_routers
from moe_emergence.moe import RouterDecision
from moe_emergence.progress import progress_bar

PLACES = 4
"""Tokens tried in every block."""
RESAMPLES = 1000


@torch.no_grad()
def regret_table(
    model: nn.Module,
    blocks: Mapping[str, Tensor],
    num_experts: int,
    top_k: int,
    *,
    batch_size: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """What the routers' choices cost, layer by layer, at some tokens of every block.

    The last of a token's K experts is exchanged for each of the E - K that it does not have, with
    the same weight and everything else as it was, and the loss of the next token is compared. For
    every layer and domain: tokens, options (O), lm_loss, `regret` over the best option,
    `random_regret` of an option drawn evenly, `gain` of the choice over such a draw with a 95%
    interval over these tokens, `best`: how often the choice was the best option (by chance 1 / O).
    Nats.

    Args:
        model: any mixture language model whose routers can be read; its mode is restored.
        blocks: token ids (R, L) of each domain.
        num_experts, top_k: E and K, which is less.
        batch_size: blocks in one forward pass.
        seed: of the places in the blocks, and of the bootstrap.
    """
    others = num_experts - top_k
    routers = find_routers(model)
    rng = np.random.default_rng(seed)
    losses: dict[tuple[int, str], list[Floats]] = {}
    ablation = Ablation(model, blocks, batch_size)
    passes = PLACES * (1 + others * len(routers)) * ablation.num_parts
    with progress_bar("trying other experts", passes) as advance:
        for domain, ids_RL in ablation.parts():
            for _ in range(PLACES):
                places = rng.integers(0, ids_RL.shape[1] - 1, len(ids_RL))
                places_R = torch.from_numpy(places).to(ids_RL.device)
                own_R = _next_losses(model, ids_RL, places_R)
                advance(1)
                for router in routers:
                    options = [own_R]
                    for other in range(others):
                        with _exchanged(router, places_R, other):
                            options.append(_next_losses(model, ids_RL, places_R))
                        advance(1)
                    key = (router.layer, domain)
                    losses.setdefault(key, []).append(np.stack(options, axis=1))
    return pd.DataFrame([
        {"layer": layer, "domain": domain, **_summary(np.concatenate(found), rng)}
        for (layer, domain), found in sorted(losses.items(), key=lambda item: item[0][0])
    ])  # fmt: skip


def _summary(losses_NO: Floats, rng: np.random.Generator) -> dict[str, Any]:
    own_N, best_N, mean_N = losses_NO[:, 0], losses_NO.min(axis=1), losses_NO.mean(axis=1)
    gain_N = mean_N - own_N
    drawn = rng.integers(0, len(gain_N), (RESAMPLES, len(gain_N)))
    low, high = np.quantile(gain_N[drawn].mean(axis=1), [0.025, 0.975])
    return {
        "tokens": len(own_N),
        "options": losses_NO.shape[1],
        "lm_loss": own_N.mean(),
        "regret": (own_N - best_N).mean(),
        "random_regret": (mean_N - best_N).mean(),
        "gain": gain_N.mean(),
        "gain_low": low,
        "gain_high": high,
        "best": (own_N == best_N).mean(),
    }


def _next_losses(model: nn.Module, ids_RL: Tensor, places_R: Tensor) -> Floats:
    """(R,) loss of the token after each place."""
    rows_R = torch.arange(len(ids_RL), device=ids_RL.device)
    logits = model(input_ids=ids_RL, use_cache=False).logits[rows_R, places_R].float()
    each = functional.cross_entropy(logits, ids_RL[rows_R, places_R + 1], reduction="none")
    found: Floats = each.double().cpu().numpy()
    return found


@contextmanager
def _exchanged(router: RouterInfo, places_R: Tensor, other: int) -> Iterator[None]:
    """At one place of every row the last expert is the `other`th of those the token has not."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        decision = isinstance(output, RouterDecision)
        experts = (output.topk_experts if decision else output[-1]).clone()
        num_experts = output.num_experts if decision else output[0].shape[-1]
        length = len(experts) // len(places_R)
        tokens_R = torch.arange(len(places_R), device=experts.device) * length + places_R
        free_RE = torch.ones(len(places_R), num_experts, device=experts.device)
        free_RE.scatter_(1, experts[tokens_R].long(), 0)
        # a stable order: the free ones come first, ascending
        order_RE = free_RE.argsort(dim=1, descending=True, stable=True)
        experts[tokens_R, -1] = order_RE[:, other].to(experts.dtype)
        if decision:
            return replace(output, topk_experts=experts, sums=None)
        return (*output[:-1], experts)

    handle = router.module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()

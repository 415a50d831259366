"""A model without some of its experts, and its loss block by block.

Letters: T tokens, E experts, K experts per token, R blocks of text, L tokens of a block.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from emergence_kernels import route
from moe_emergence.analysis.routers import RouterInfo
from moe_emergence.config import DOMAINS
from moe_emergence.moe import RouterDecision
from moe_emergence.moe.routing import TopKRouter

How = Literal["rerouted", "zeroed"]
Floats = npt.NDArray[np.float64]


@torch.no_grad()
def block_losses(
    model: nn.Module, blocks: Mapping[str, Tensor], batch_size: int
) -> dict[str, Floats]:
    """(R,) mean next-token loss in nats of every block, for the domains that have any."""
    device = next(model.parameters()).device
    found: dict[str, Floats] = {}
    for domain in DOMAINS:
        losses: list[Tensor] = []
        for part in blocks.get(domain, torch.zeros(0, 1)).split(batch_size):
            ids = part.long().to(device)
            if not len(ids):
                continue
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            flat = logits.reshape(-1, logits.shape[-1]).float()
            each = functional.cross_entropy(flat, ids[:, 1:].reshape(-1), reduction="none")
            losses.append(each.view(len(ids), -1).double().mean(dim=1).cpu())
        if losses:
            found[domain] = torch.cat(losses).numpy()
    return found


def how_removed(router: RouterInfo, experts: int = 1) -> How:
    """Whether the router can choose others in place of `experts` of its experts that are gone."""
    module = router.module
    if isinstance(module, TopKRouter) and module.weight.shape[0] - experts >= module.top_k:
        return "rerouted"
    return "zeroed"


@contextmanager
def without_experts(removed: Mapping[RouterInfo, Collection[int]]) -> Iterator[None]:
    """The model without the experts named for each router, within the block.

    Where the router can choose others it does (`how_removed`); else what is gone adds nothing.
    """
    with ExitStack() as stack:
        for router, experts in removed.items():
            if experts:
                how = how_removed(router, len(experts))
                hook = _rerouting(experts) if how == "rerouted" else _zeroing(experts)
                stack.callback(router.module.register_forward_hook(hook).remove)
        yield


def _rerouting(experts: Collection[int]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> RouterDecision:
        assert isinstance(module, TopKRouter)
        # a finite number: log(0) times a probability of 0 would be NaN in the sums
        logits = output.router_logits.clone()
        logits[:, list(experts)] = -1e9
        routing = route(logits, module.top_k, None, module.expert_bias)
        weights = routing.weights_TK
        if module.weigh_by_probability:
            weights = routing.probs_TE.gather(1, routing.experts_TK)
        return RouterDecision(
            logits, routing.probs_TE, routing.noisy_probs_TE, routing.experts_TK, weights
        )

    return hook


def _zeroing(experts: Collection[int]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        decision = isinstance(output, RouterDecision)
        chosen = output.topk_experts if decision else output[-1]
        kept = ~torch.isin(chosen, torch.tensor(list(experts), device=chosen.device))
        if decision:
            return replace(output, topk_weights=output.topk_weights * kept)
        *first, weights, _ = output
        return (*first, weights * kept, chosen)

    return hook

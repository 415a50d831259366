"""A model without some of its experts, and its loss block by block.

Letters: T tokens, E experts, K experts per token, R blocks of text, L tokens of a block.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from emergence_kernels import route
from moe_emergence.analysis.routers import RouterInfo, find_routers
from moe_emergence.models import MixtureModel
from moe_emergence.models.lower_layers import lower_states, lower_states_given
from moe_emergence.models.mode import evaluating
from moe_emergence.moe import RouterDecision
from moe_emergence.moe.routing import TopKRouter

How = Literal["rerouted", "zeroed"]
Floats = npt.NDArray[np.float64]
_KEPT_BYTES = 2**30


@torch.no_grad()
def block_losses(
    model: nn.Module, blocks: Mapping[str, Tensor], batch_size: int
) -> dict[str, Floats]:
    """(R,) mean next-token loss in nats of every block, for the domains that have any."""
    device = next(model.parameters()).device
    return {
        domain: np.concatenate([
            _row_losses(model, part.long().to(device)) for part in rows.split(batch_size)
        ])
        for domain, rows in _of_domains(blocks).items()
    }  # fmt: skip


class Ablation:
    """A model's loss block by block (see `block_losses`), whole and without some of its experts.

    What lies below this library's first mixture layer is the same for all, so it runs once; its
    hidden states are kept, up to a GiB of them.

    Args:
        model: any mixture language model whose routers can be read; its mode is restored.
        blocks: token ids (R, L) of each domain.
        batch_size: blocks in one forward pass.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, Tensor], batch_size: int = 8) -> None:
        self.model, self.routers = model, find_routers(model)
        device, room = next(model.parameters()).device, _KEPT_BYTES
        self._parts: list[tuple[str, Tensor, Tensor | None]] = []
        for domain, rows in _of_domains(blocks).items():
            for part in rows.split(batch_size):
                ids, states = part.long().to(device), None
                if isinstance(model, MixtureModel) and self.routers[0].layer and room > 0:
                    with evaluating(model):
                        states = lower_states(model, self.routers[0].layer, ids).cpu()
                    room -= states.nbytes
                self._parts.append((domain, ids, states))
        self.whole = self.without({})
        """Per domain (R,) losses of the model as it is."""

    @torch.no_grad()
    def without(self, removed: Mapping[RouterInfo, Collection[int]]) -> dict[str, Floats]:
        """Per domain (R,) losses without the experts that are named for each router."""
        losses: dict[str, list[Floats]] = {}
        with without_experts(removed):
            for domain, ids_RL in self.parts():
                losses.setdefault(domain, []).append(_row_losses(self.model, ids_RL))
        return {domain: np.concatenate(found) for domain, found in losses.items()}

    @property
    def num_parts(self) -> int:
        """Batches in `parts`."""
        return len(self._parts)

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Domain and token ids (R, L) of every batch.

        While it is the current one the model is in evaluation mode, and the layers below its first
        mixture layer do not run.
        """
        with evaluating(self.model):
            for domain, ids, states in self._parts:
                with self._above(None if states is None else states.to(ids.device)):
                    yield domain, ids

    def _above(self, states: Tensor | None) -> AbstractContextManager[None]:
        if states is None:
            return nullcontext()
        assert isinstance(self.model, MixtureModel)
        return lower_states_given(self.model, self.routers[0].layer, states)


def _of_domains(blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {domain: part for domain, part in blocks.items() if len(part)}


def _row_losses(model: nn.Module, ids_RL: Tensor) -> Floats:
    logits = model(input_ids=ids_RL, use_cache=False).logits[:, :-1]
    flat = logits.reshape(-1, logits.shape[-1]).float()
    each = functional.cross_entropy(flat, ids_RL[:, 1:].reshape(-1), reduction="none")
    found: Floats = each.view(len(ids_RL), -1).double().mean(dim=1).cpu().numpy()
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
    gone = list(experts)

    def hook(module: nn.Module, inputs: Any, output: Any) -> RouterDecision:
        assert isinstance(module, TopKRouter)
        # a finite number: log(0) times a probability of 0 would be NaN in the sums
        logits = output.router_logits.clone()
        logits[:, gone] = -1e9
        bias_E = module.expert_bias
        if bias_E is not None:
            # the choice is by probability and bias: neither may bring one back
            bias_E = bias_E.clone()
            bias_E[gone] = -1e9
        routing = route(logits, module.top_k, None, bias_E)
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

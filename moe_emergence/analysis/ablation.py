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

from moe_emergence.analysis.routers import RouterInfo, find_routers
from moe_emergence.analysis.steering import choosing_again
from moe_emergence.device import input_device
from moe_emergence.models import MixtureModel
from moe_emergence.models.lower_layers import lower_states_given, states_read
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
    device = input_device(model)
    return {
        domain: np.concatenate([
            _row_losses(model, part.long().to(device)) for part in rows.split(batch_size)
        ])
        for domain, rows in _of_domains(blocks).items()
    }  # fmt: skip


class Ablation:
    """A model's loss block by block (see `block_losses`), whole and without some of its experts.

    What lies below the lowest layer of this library's that lacks something is as it was: what each
    mixture layer reads is kept, up to a GiB of it.

    Args:
        model: any mixture language model whose routers can be read; its mode is restored.
        blocks: token ids (R, L) of each domain.
        batch_size: blocks in one forward pass.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, Tensor], batch_size: int = 8) -> None:
        self.model, self.routers = model, find_routers(model)
        device, room = input_device(model), _KEPT_BYTES
        self._parts: list[tuple[str, Tensor, dict[int, Tensor]]] = []
        losses: dict[str, list[Floats]] = {}
        for domain, rows in _of_domains(blocks).items():
            for part in rows.split(batch_size):
                ids, kept = part.long().to(device), {}
                with evaluating(model), torch.no_grad(), self._reading() as states:
                    losses.setdefault(domain, []).append(_row_losses(model, ids))
                for layer in sorted(states):
                    if room > 0:
                        kept[layer] = states[layer].cpu()
                        room -= states[layer].nbytes
                self._parts.append((domain, ids, kept))
        self.whole = {domain: np.concatenate(found) for domain, found in losses.items()}
        """Per domain (R,) losses of the model as it is."""

    @torch.no_grad()
    def without(self, removed: Mapping[RouterInfo, Collection[int]]) -> dict[str, Floats]:
        """Per domain (R,) losses without the experts that are named for each router."""
        losses: dict[str, list[Floats]] = {}
        lowest = min((router.layer for router, gone in removed.items() if gone), default=None)
        with without_experts(removed):
            for domain, ids_RL in self.parts(lowest):
                losses.setdefault(domain, []).append(_row_losses(self.model, ids_RL))
        return {domain: np.concatenate(found) for domain, found in losses.items()}

    @property
    def num_parts(self) -> int:
        """Batches in `parts`."""
        return len(self._parts)

    def parts(self, lowest: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """Domain and token ids (R, L) of every batch.

        While it is the current one the model is in evaluation mode, and the layers below the
        mixture layer `lowest` (the first, if it is None) do not run.
        """
        lowest = self.routers[0].layer if lowest is None else lowest
        with evaluating(self.model):
            for domain, ids, states in self._parts:
                known = [layer for layer in states if layer <= lowest]
                with self._above(max(known), states, ids.device) if known else nullcontext():
                    yield domain, ids

    def _reading(self) -> AbstractContextManager[dict[int, Tensor]]:
        if not isinstance(self.model, MixtureModel):
            return nullcontext({})
        return states_read(self.model, [router.layer for router in self.routers if router.layer])

    def _above(
        self, layer: int, states: dict[int, Tensor], device: torch.device
    ) -> AbstractContextManager[None]:
        assert isinstance(self.model, MixtureModel)
        return lower_states_given(self.model, layer, states[layer].to(device))


def _of_domains(blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {domain: part for domain, part in blocks.items() if len(part)}


def _row_losses(model: nn.Module, ids_RL: Tensor) -> Floats:
    return next_token_losses(model(input_ids=ids_RL, use_cache=False).logits, ids_RL)


def next_token_losses(logits_RLV: Tensor, ids_RL: Tensor) -> Floats:
    """(R,) mean loss in nats of every block."""
    logits = logits_RLV[:, :-1]
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
                hook = choosing_again(experts, {}) if how == "rerouted" else _zeroing(experts)
                stack.callback(router.module.register_forward_hook(hook).remove)
        yield


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

"""Where the routers of a model send tokens while it trains, counted without waiting for the device.

Letters: N mixture layers of one shape, T tokens of a forward pass, E experts, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_emergence.analysis.routers import (
    RouterInfo,
    ScoreKind,
    find_routers,
    probabilities,
    score_kind,
    scores_and_experts,
)


@dataclass(frozen=True)
class LayerLoad:
    """What a layer's router did with the tokens that were counted."""

    layer: int
    """Index in the model."""
    counts: list[int]
    """(E,) assignments."""
    top_k: int
    entropy: float
    """Mean over the tokens of the entropy of the router's probabilities, nats."""


@dataclass(eq=False)
class _Sums:
    """Of layers with as many experts, on the device."""

    counts_NE: Tensor
    entropy_N: Tensor
    tokens: Tensor


class RoutingMeter:
    """Counts the training passes of a mixture through hooks on the model and its routers.

    Counted are passes of the whole model in training mode with gradients: neither evaluation nor
    generation, and a layer that gradient checkpointing computes again during backward no second
    time. Tokens that a two-dimensional `attention_mask` excludes are left out.

    Raises:
        ValueError: when the model has no routers, or one returns something else than it should.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.routers = find_routers(model)
        config = getattr(model, "config", None)
        self._kinds = [score_kind(router.module, config) for router in self.routers]
        self._handles: list[Any] = []
        self._counting = False
        self._mask: Tensor | None = None
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._sums: dict[tuple[tuple[int, ...], int], _Sums] = {}

    def start(self) -> None:
        """Count from here on."""
        self.stop()
        self._handles = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end, always_call=True),
            *(
                router.module.register_forward_hook(partial(self._decided, place, router))
                for place, router in enumerate(self.routers)
            ),
        ]

    def stop(self) -> None:
        """Take the hooks away, and forget what was counted."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._sums = [], {}

    def take(self, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> list[LayerLoad]:
        """What was counted since the last call, by layer; waits for the device.

        Args:
            total: sums a tensor over the processes.
        """
        sums, self._sums = self._sums, {}
        found: dict[int, LayerLoad] = {}
        for (places, top_k), part in sums.items():
            counts = total(part.counts_NE).tolist()
            tokens = max(int(total(part.tokens)), 1)
            entropies = total(part.entropy_N).tolist()
            for place, row, entropy in zip(places, counts, entropies, strict=True):
                layer = self.routers[place].layer
                found[place] = LayerLoad(layer, row, top_k, entropy / tokens)
        return [found[place] for place in sorted(found)]

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._counting = model.training and torch.is_grad_enabled()
        self._mask = kwargs.get("attention_mask")

    def _decided(
        self, place: int, router: RouterInfo, module: nn.Module, inputs: Any, output: Any
    ) -> None:
        if self._counting:
            self._seen[place] = scores_and_experts(router.name, output)

    @torch.no_grad()
    def _end(self, model: nn.Module, inputs: Any, output: Any) -> None:
        seen, mask = self._seen, self._mask
        self._seen, self._mask, self._counting = {}, None, False
        if output is None:  # the pass failed
            return
        # layers of one shape are counted at once: a launch for all of them, not for each
        alike: dict[tuple[int, int, ScoreKind], list[int]] = {}
        for place, (scores, experts) in seen.items():
            shape = scores.shape[1], experts.shape[1], self._kinds[place]
            alike.setdefault(shape, []).append(place)
        for (_, top_k, kind), places in alike.items():
            scores_NTE = torch.stack([seen[place][0] for place in places])
            experts_NTK = torch.stack([seen[place][1] for place in places])
            entropy_NT = torch.special.entr(probabilities(scores_NTE, kind)).sum(dim=2)
            found = _count(entropy_NT, experts_NTK, scores_NTE.shape[2], mask)
            before = self._sums.setdefault((tuple(places), top_k), found)
            if before is not found:
                before.counts_NE += found.counts_NE
                before.entropy_N += found.entropy_N
                before.tokens += found.tokens


def _count(entropy_NT: Tensor, experts_NTK: Tensor, num_experts: int, mask: Tensor | None) -> _Sums:
    layers, tokens, _ = experts_NTK.shape
    device = experts_NTK.device
    kept_T = torch.ones(tokens, dtype=torch.int64, device=device)
    if mask is not None and mask.ndim == 2 and mask.numel() == tokens:
        kept_T = mask.reshape(-1).to(device).ne(0).long()
    cells = experts_NTK + num_experts * torch.arange(layers, device=device).view(-1, 1, 1)
    counts = torch.zeros(layers * num_experts, dtype=torch.int64, device=device)
    # `bincount` would ask the device for the largest value
    counts.scatter_add_(0, cells.flatten(), kept_T[:, None].expand_as(cells).flatten())
    entropy_N = (entropy_NT * kept_T).sum(dim=1)
    return _Sums(counts.view(layers, -1), entropy_N, kept_T.sum())

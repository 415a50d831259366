"""A fixed text, and how much of it changes its expert from one check to the next.

Letters: N mixture layers, B sequences, L tokens each, T tokens that are no padding.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe_emergence.analysis.routers import RouterReader

SHAPE = (8, 128)
"""Sequences and tokens at most that are taken from a batch."""


class RoutingProbe:
    """Remembers the first expert of every token of a fixed text.

    Args:
        token_ids: (B, L) without padding; without them the beginning of the first training batch
            that the model sees after `watch`.
    """

    def __init__(self, token_ids: Tensor | None) -> None:
        self._ids = token_ids
        self._mask: Tensor | None = None
        self._experts_NT: Tensor | None = None
        self._handle: Any = None

    def watch(self, model: nn.Module) -> None:
        """Take the text from the model's first training pass, where none was given."""
        if self._ids is None:
            self._handle = model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def stop(self) -> None:
        """Take the hook away."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def check(self, model: nn.Module) -> tuple[list[int], Tensor] | None:
        """The layers, and for each (N, 2) tokens with another first expert than at the last check,
        and tokens; None at the first check. Nothing waits for the device.
        """
        if self._ids is None:
            return None
        reader = RouterReader(model)
        with reader.reading():
            routings = reader.read(self._ids, self._mask)
            experts_NT = torch.stack([routing.experts_TK[:, 0] for routing in routings])
        kept_T = torch.ones_like(experts_NT[0], dtype=torch.bool)
        if self._mask is not None:
            kept_T = self._mask.flatten().ne(0)
        before, self._experts_NT = self._experts_NT, experts_NT
        if before is None:
            return None
        changed_N = ((before != experts_NT) & kept_T).sum(dim=1)
        return reader.layers, torch.stack([changed_N, kept_T.sum().expand_as(changed_N)], dim=1)

    def _keep(self, model: nn.Module, inputs: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", inputs[0] if inputs else None)
        if self._ids is not None or not model.training or not isinstance(ids, Tensor):
            return
        rows, length = SHAPE
        self._ids = ids[:rows, :length].detach().clone()
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            self._mask = mask[:rows, :length].detach().clone()

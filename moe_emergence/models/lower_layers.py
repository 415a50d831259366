"""The layers below the first that changes: run once for a text, passed over after that.

Letters: B sequences, L tokens each, H model width.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_emergence.models.block import MoEGPT2Block


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a language model of a family in `FAMILIES`, dense or mixture."""
    base: Any = model.base_model
    found: nn.ModuleList = base.h if hasattr(base, "h") else base.layers
    return found


def lower_modules(model: PreTrainedModel, first: int) -> list[nn.Module]:
    """All that acts before layer `first`: the embeddings and the layers below.

    A head that is tied to the embeddings has their weights.
    """
    base: Any = model.base_model
    positions = [base.wpe] if hasattr(base, "wpe") else []
    return [model.get_input_embeddings(), *positions, *layers_of(model)[:first]]


def freeze_lower_layers(model: PreTrainedModel, first: int) -> None:
    """Train no layer below `first`, nor, unless `first` is 0, the embeddings."""
    for module in lower_modules(model, first) if first else ():
        module.requires_grad_(False)


@torch.no_grad()
def lower_states(model: PreTrainedModel, first: int, input_ids_BL: Tensor) -> Tensor:
    """(B, L, H) hidden states that layer `first` reads; the layers from there on do not run."""
    layers = layers_of(model)
    reader = _Passed(layers[first])
    upper = {place: _Passed(layers[place]) for place in range(first + 1, len(layers))}
    with _replaced(layers, {first: reader, **upper}):
        model.base_model(input_ids=input_ids_BL, use_cache=False)
    assert reader.read is not None
    return reader.read


@contextmanager
def states_read(model: PreTrainedModel, places: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Within the block, the hidden states (B, L, H) that the layers at `places` read last."""
    found: dict[int, Tensor] = {}

    def keep(place: int, layer: nn.Module, read: tuple[Any, ...]) -> None:
        found[place] = read[0].detach()

    layers = layers_of(model)
    hooks = [layers[n].register_forward_pre_hook(partial(keep, n)) for n in places]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def lower_states_given(model: PreTrainedModel, first: int, states_BLH: Tensor) -> Iterator[None]:
    """Within the block the layers below `first` (at least 1) do not run: it reads `states_BLH`."""
    layers = layers_of(model)
    passed = {place: _Passed(layers[place]) for place in range(first)}
    passed[first - 1].given = states_BLH
    with _replaced(layers, passed):
        yield


class _Passed(nn.Module):
    """In place of a layer: returns what it reads, or what it is given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.returns_decision = isinstance(layer, MoEGPT2Block)
        self.given: Tensor | None = None
        self.read: Tensor | None = None

    def forward(self, hidden_BLH: Tensor, *others: Any, **named: Any) -> Any:
        self.read = hidden_BLH
        hidden_BLH = hidden_BLH if self.given is None else self.given
        return (hidden_BLH, None) if self.returns_decision else hidden_BLH


@contextmanager
def _replaced(layers: nn.ModuleList, by_place: Mapping[int, nn.Module]) -> Iterator[None]:
    own = {place: layers[place] for place in by_place}
    for place, layer in by_place.items():
        layers[place] = layer
    try:
        yield
    finally:
        for place, layer in own.items():
            layers[place] = layer

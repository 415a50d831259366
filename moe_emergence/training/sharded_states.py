"""States of sharded models and optimizers without their layout: what one process would have.

Shards are gathered for a checkpoint and cut for the processes that resume it, so it does not
matter how many processes wrote it or in what layout.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from moe_emergence.models.loading import LanguageModel


def whole_weights(model: LanguageModel) -> dict[str, Any] | None:
    """The state dict of a sharded model, gathered; None for a model that is not sharded.

    All processes have to call it. What is sharded is on the host of the first one, and None on the
    others.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    weights = {name: _whole(tensor) for name, tensor in model.state_dict().items()}
    # each was gathered for itself, and what is one tensor is saved once
    return weights | {name: weights[one] for name, one in model.all_tied_weights_keys.items()}


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()`, gathered as `whole_weights`. All processes have to call it."""
    return _mapped(optimizer, optimizer.state_dict(), lambda _, value: _whole(value))


def load_whole_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a `whole_state`, whatever the layout that it was gathered from."""

    def cut(parameter: Tensor, value: Any) -> Any:
        if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            return value
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(value, mesh, placements, src_data_rank=None)

    optimizer.load_state_dict(_mapped(optimizer, state, cut))


def _whole(value: Any) -> Any:
    """A sharded tensor whole, on the host of the first process; other values as they are."""
    if not isinstance(value, DTensor):
        return value
    placements = list(value.placements)
    # FSDP, whose dimensions of the mesh come first, cut what expert parallelism had cut
    for dimension in range(len(placements)):
        placements[dimension] = Replicate()
        value = value.redistribute(placements=placements)
    return value.to_local().cpu() if torch.distributed.get_rank() == 0 else None


def _mapped(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], change: Callable[[Tensor, Any], Any]
) -> dict[str, Any]:
    """A state dict with `change(parameter, value)` of every value."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    changed = {
        index: {name: change(parameters[index], value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": changed}

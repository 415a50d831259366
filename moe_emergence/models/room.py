"""Whether a model has room in memory, found out without making its weights."""

import os
from collections.abc import Callable
from typing import Any

import torch

from moe_emergence.hub_access import reason
from moe_emergence.settings import check

MOST_LAYERS = 4096
"""Layers of the largest model that is worth counting: each of them is made, without weights."""
GB = 1e9


def weights_in(make: Callable[[Any], torch.nn.Module], config: Any) -> int:
    """Number of weights of the model that `make` makes of a configuration.

    Raises:
        ValueError: for a configuration whose sizes make no model.
    """
    layers = getattr(config, "num_hidden_layers", 1)
    if not isinstance(layers, int) or not 1 <= layers <= MOST_LAYERS:
        raise ValueError(f"num_hidden_layers {layers}: a model has 1 to {MOST_LAYERS}")
    try:
        with torch.device("meta"):
            model = make(config)
    except Exception as error:  # every field that is wrong fails in its own way
        raise ValueError(f"its sizes make no model, {reason(error)}") from error
    return sum(weight.numel() for weight in model.parameters())


def check_fits(
    flag: str, given: object, make: Callable[[Any], torch.nn.Module], config: Any
) -> None:
    """Refuse a model whose weights, in fp32, are more than this machine's memory.

    Raises:
        ValueError: naming `flag` and what was `given`.
    """
    try:
        count = weights_in(make, config)
    except ValueError as error:
        raise ValueError(f"{flag} {given}: {error}") from error
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    check(
        4 * count <= memory,
        flag,
        given,
        f"{count / GB:,.1f} billion weights take {4 * count / GB:,.0f} GB in fp32, and this "
        f"machine has {memory / GB:,.0f}; give a smaller model or fewer experts",
    )

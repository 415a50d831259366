"""The interchangeable paths from tokens to experts and back, by name.

Letters: T tokens, H model width.
"""

from collections.abc import Callable
from typing import Literal, Protocol, get_args

from torch import Tensor

from moe_emergence.moe.experts import Experts
from moe_emergence.moe.fused import FusedDispatcher
from moe_emergence.moe.grouped import GroupedDispatcher
from moe_emergence.moe.megablocks import MegaBlocksDispatcher
from moe_emergence.moe.routing import RouterDecision
from moe_emergence.moe.sequential import SequentialDispatcher

DispatchName = Literal["auto", "sequential", "grouped", "fused", "megablocks"]


class Dispatcher(Protocol):
    """A path without parameters of its own: one state dict serves them all."""

    def __call__(self, x_TH: Tensor, decision: RouterDecision, experts: Experts) -> Tensor:
        """Weighted sum (T, H) of every token's experts, as `SequentialDispatcher` defines it."""
        ...


_DISPATCHERS: dict[str, Callable[[], Dispatcher]] = {
    "auto": FusedDispatcher,
    "sequential": SequentialDispatcher,
    "grouped": GroupedDispatcher,
    "fused": FusedDispatcher,
    "megablocks": MegaBlocksDispatcher,
}


def get_dispatcher(name: str) -> Dispatcher:
    """The dispatcher called `name`; "auto" is the fastest one that is correct everywhere.

    Raises:
        ValueError: for an unknown name, or one whose package is not installed (saying what to
            install).
    """
    if name not in _DISPATCHERS:
        raise ValueError(f"--dispatch {name}: choose from {', '.join(get_args(DispatchName))}")
    return _DISPATCHERS[name]()

"""The interchangeable paths from tokens to experts and back, by name.

Letters: T tokens, H model width.
"""

from collections.abc import Callable
from typing import Protocol, get_args

from torch import Tensor

from moe_emergence.moe.experts import Experts
from moe_emergence.moe.fused import FusedDispatcher
from moe_emergence.moe.grouped import GroupedDispatcher
from moe_emergence.moe.megablocks import MegaBlocksDispatcher
from moe_emergence.moe.sequential import SequentialDispatcher
from moe_emergence.moe.tuning import TuningTable
from moe_emergence.names import DispatchName


class Dispatcher(Protocol):
    """A path without parameters of its own: one state dict serves them all."""

    def __call__(
        self, x_TH: Tensor, topk_experts: Tensor, topk_weights: Tensor, experts: Experts
    ) -> Tensor:
        """Weighted sum (T, H) over the chosen experts `topk_experts` (T, K) of every token `x_TH`
        (T, H), by `topk_weights` (T, K), as `SequentialDispatcher` defines it."""
        ...


class AutoDispatcher:
    """The fastest path: the one measured for the shape, where it was, else the fused one.

    On CPUs `python -m benchmarks.grid` compares the paths.
    """

    def __init__(self, table: TuningTable | None = None) -> None:
        self.table = table
        self.paths: dict[str, Dispatcher] = {
            "fused": FusedDispatcher(table),
            "grouped": GroupedDispatcher(),
            "sequential": SequentialDispatcher(),
        }

    def __call__(
        self, x_TH: Tensor, topk_experts: Tensor, topk_weights: Tensor, experts: Experts
    ) -> Tensor:
        """Weighted sum (T, H) of every token's experts."""
        top_k = topk_experts.shape[1]
        entry = None if self.table is None else self.table.find(x_TH, top_k, experts)
        name = "fused" if entry is None else entry.dispatch
        return self.paths[name](x_TH, topk_experts, topk_weights, experts)


_DISPATCHERS: dict[str, Callable[[TuningTable | None], Dispatcher]] = {
    "auto": AutoDispatcher,
    "sequential": lambda _: SequentialDispatcher(),
    "grouped": lambda _: GroupedDispatcher(),
    "fused": FusedDispatcher,
    "megablocks": lambda _: MegaBlocksDispatcher(),
}


def get_dispatcher(name: str, table: TuningTable | None = None) -> Dispatcher:
    """The dispatcher called `name`; "auto" is the fastest one that is correct everywhere.

    Args:
        name: one of `DispatchName`.
        table: what was measured on this device; without it the defaults are used.

    Raises:
        ValueError: for an unknown name, or one whose package is not installed (saying what to
            install).
    """
    if name not in _DISPATCHERS:
        raise ValueError(f"dispatch {name}: choose from {', '.join(get_args(DispatchName))}")
    return _DISPATCHERS[name](table)

"""The interchangeable paths from tokens to experts and back, by name.

Letters: T tokens, H model width.
"""

from collections.abc import Callable
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from moe_emergence.moe.experts import Experts
from moe_emergence.moe.fused import FusedDispatcher
from moe_emergence.moe.grouped import GroupedDispatcher
from moe_emergence.moe.megablocks import MegaBlocksDispatcher
from moe_emergence.moe.routing import RouterDecision
from moe_emergence.moe.sequential import SequentialDispatcher
from moe_emergence.moe.tuning import TuningTable

_WORK_OF_A_LAUNCH = 320_000_000
"""Multiplications of one expert's product in fp32 that take 10 us longer at 28 TFLOP/s than at 50;
expected figures, not measured."""
DispatchName = Literal["auto", "sequential", "grouped", "fused", "megablocks"]


class Dispatcher(Protocol):
    """A path without parameters of its own: one state dict serves them all."""

    def __call__(self, x_TH: Tensor, decision: RouterDecision, experts: Experts) -> Tensor:
        """Weighted sum (T, H) of every token's experts, as `SequentialDispatcher` defines it."""
        ...


class AutoDispatcher:
    """The fastest path: the one measured for the shape, where it was, else `unmeasured_path`."""

    def __init__(self, table: TuningTable | None = None) -> None:
        self.table = table
        self.paths: dict[str, Dispatcher] = {
            "fused": FusedDispatcher(table),
            "grouped": GroupedDispatcher(),
            "sequential": SequentialDispatcher(),
        }

    def __call__(self, x_TH: Tensor, decision: RouterDecision, experts: Experts) -> Tensor:
        """Weighted sum (T, H) of every token's experts."""
        top_k = decision.topk_experts.shape[1]
        entry = None if self.table is None else self.table.find(x_TH, top_k, experts)
        name = unmeasured_path(x_TH, top_k, experts) if entry is None else entry.dispatch
        return self.paths[name](x_TH, decision, experts)


def unmeasured_path(x_TH: Tensor, top_k: int, experts: Experts) -> str:
    """The path for a shape that nobody measured here: the fused one, but for IEEE fp32 on a GPU.

    Without matrix units our products wait for shared memory, at about half of what cuBLAS is
    expected to reach (docs/kernels.md); so torch's grouped products are taken where that saves more
    than what they cost, a launch for every expert and a wait for the routing. On CPUs
    `python -m benchmarks.grid` compares the paths.
    """
    is_ieee = (
        x_TH.is_cuda
        and x_TH.dtype == torch.float32
        and not torch.is_autocast_enabled("cuda")
        and torch.get_float32_matmul_precision() == "highest"
    )
    rows_per_expert = x_TH.shape[0] * top_k / experts.num_experts
    whole_rows = all(width % 4 == 0 for width in (*experts.w1.shape[1:], *experts.w2.shape[1:]))
    work = rows_per_expert * experts.w2.shape[1] * experts.w2.shape[2]
    return "grouped" if is_ieee and work >= _WORK_OF_A_LAUNCH and whole_rows else "fused"


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
        raise ValueError(f"--dispatch {name}: choose from {', '.join(get_args(DispatchName))}")
    return _DISPATCHERS[name](table)

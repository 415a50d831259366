"""A stand-in for a CUDA graph on a CPU: the operators of a step, recorded and run again.

As on a GPU, a recording does no work, numbers that Python saw are constants of it, every tensor
keeps its memory, and asking a tensor for its value is refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from moe_emergence.cuda_graph import NotCapturableError
from moe_emergence.training.update import Outcome


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.made: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise NotCapturableError("the value of a tensor is asked for")
        given = _tensors((args, kwargs))
        if func._schema.is_mutable:
            for tensor in given:
                if _place(tensor) not in self.made:
                    self.before.setdefault(_place(tensor), (tensor, tensor.clone()))
        call = func, *_aliases((args, kwargs))
        results = func(*args, **kwargs)
        outs = _tensors(results)
        self.made |= {_place(t) for t in outs} - {_place(t) for t in given}
        self.calls.append((*call, _aliases(outs)))
        return results


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _aliases(tree: Any) -> Any:
    """The same memory under shapes that no later operator changes."""
    return tree_map(lambda x: torch.ops.aten.alias(x) if isinstance(x, Tensor) else x, tree)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class RecordedOnCpu:
    """Implements `Capture`; counts what it was asked for."""

    def __init__(self) -> None:
        self.rehearsals = self.records = self.replays = 0

    def rehearse(self, work: Callable[[], Outcome]) -> tuple[Outcome, str | None]:
        self.rehearsals += 1
        return work(), None

    def record(self, work: Callable[[], Outcome]) -> Callable[[], Outcome]:
        self.records += 1
        recorder = _Recorder()
        drawn = torch.get_rng_state()
        try:
            with recorder:
                outcome = work()
        finally:
            torch.set_rng_state(drawn)
            with torch.no_grad():
                for tensor, value in recorder.before.values():
                    tensor.copy_(value)

        def replay() -> Outcome:
            self.replays += 1
            with torch.no_grad():
                for func, *given, outs in recorder.calls:
                    args, kwargs = _aliases(given)
                    for old, new in zip(outs, _tensors(func(*args, **kwargs)), strict=True):
                        if _place(old) != _place(new):
                            old.copy_(new)
            return outcome

        return replay

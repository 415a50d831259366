"""Where a step that ended in NaN or infinity has the first such value."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def where_not_finite(accelerator: Accelerator, model: nn.Module, work: Callable[[], object]) -> str:
    """Do `work` once more, and say which tensor of `model` is the first that is not finite.

    Looked through in this order: parameters and buffers, what modules return as they are run, then
    gradients, last layer first as backward computes them. Every look waits for the device. All
    processes have to call it; of sharded parameters each looks through its part.

    Args:
        accelerator: processes.
        model: the language model, with the weights that the failed step began with.
        work: runs it on the failed step's batch, with or without backward.

    Returns:
        One clause that names the tensor, and how many of its rows or values are concerned.
    """
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if found := _any(accelerator, _first(weights)):
        return f"the weight {found}"
    model.zero_grad(set_to_none=True)
    try:
        with _first_output(model) as outputs:
            work()
    except torch.OutOfMemoryError:
        return "there is no memory for a second pass, which would say where"
    if found := _any(accelerator, outputs[0] if outputs else None):
        return f"first, the output of {found}"
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if found := _any(accelerator, _first(dict(reversed(gradients.items())))):
        return f"outputs of modules are finite, the gradient of {found}"
    return "outputs of modules and gradients are finite when the step is taken again"


def _any(accelerator: Accelerator, found: str | None) -> str | None:
    """What this process has found, or else the first process that has found something."""
    if accelerator.num_processes == 1:
        return found
    return next((one for one in gather_object([found]) if one is not None), None)


def _first(tensors: Mapping[str, Tensor]) -> str | None:
    """The first of them with a value that is not finite: its name, and how many values are not."""
    for name, tensor in tensors.items():
        count = _bad(tensor).sum()
        if count:
            return f"{name} is not finite in {count:,} of {_local(tensor).numel():,} values"
    return None


@contextmanager
def _first_output(model: nn.Module) -> Iterator[list[str]]:
    """Within the block, a list that gets the first module's output that is not finite."""
    found: list[str] = []

    def look(name: str, module: nn.Module, given: object, output: object) -> None:
        tensors = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        for tensor in tensors if not found else ():
            bad_T = _bad(tensor).reshape(-1, tensor.shape[-1] if tensor.ndim else 1).any(dim=1)
            if bad_T.any():
                rows = f"{bad_T.sum():,} of {len(bad_T):,} rows"
                found.append(f"{name} is not finite in {rows}")
                return

    hooks: list[Any] = [
        module.register_forward_hook(partial(look, name))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _bad(tensor: Tensor) -> Tensor:
    return ~_local(tensor).detach().isfinite()


def _local(tensor: Any) -> Tensor:
    """This process's part of a sharded tensor."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part

"""Registration of the operators with torch, so that `torch.compile` sees each as one opaque step.

`torch.library.Library` rather than `torch.library.custom_op`: half the overhead of a call, and
nothing that imports the compiler before anything is compiled.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LIBRARY = torch.library.Library("emergence", "FRAGMENT")


@cache
def triton_is_installed() -> bool:
    """Whether the kernels can be imported at all."""
    return importlib.util.find_spec("triton") is not None


def define(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register `emergence::<schema>` and return the callable operator.

    Args:
        schema: name, arguments and results in torch's schema language.
        implementation: computes the results on any device; must not return its arguments.
        fake: gives results of the right shape, dtype and device without computing.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"emergence::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.emergence, name).default
    return operator


def differentiate(
    name: str,
    backward: Callable[..., tuple[Tensor | None, ...]],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
) -> None:
    """Give the operator `name` a gradient, as `torch.autograd.Function` would: `setup_context`
    saves what `backward` needs. Differentiating the gradient again is an error."""
    once = once_differentiable(backward)
    torch.library.register_autograd(
        f"emergence::{name}", once, setup_context=setup_context, lib=_LIBRARY
    )

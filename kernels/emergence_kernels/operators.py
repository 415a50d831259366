"""Operators that `torch.compile` sees as one opaque step, and that cost little where nothing looks.

Registered with `torch.library.Library`, a call passes the dispatcher several times, each time from
Python to C++ and back: more than ten launches' worth. Only compilers, modes, transforms and tensor
subclasses need that; plain tensors go straight to the implementation.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

NAMESPACE = __name__.partition(".")[0]
"""The package's name, so that copies under other names, as of the kernel hub, do not collide."""
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

Backward = Callable[..., tuple[Tensor | None, ...]]
SetupContext = Callable[[Any, tuple[Any, ...], Any], None]


@cache
def triton_is_installed() -> bool:
    """Whether the kernels can be imported at all."""
    return importlib.util.find_spec("triton") is not None


def kernels_take(x: Tensor) -> bool:
    """Whether a product of these rows can go through the Triton kernels."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    return x.is_cuda and x.dtype in floats and triton_is_installed()


def sizes_of(
    name: str, specs: Sequence[tuple[str, str]], operands: Sequence[Tensor | None]
) -> dict[str, int]:
    """Sizes by letter of operands, of each of which `specs` has the name and the shape's letters.

    Raises:
        ValueError: for operands of `name` on two devices, or whose shapes do not fit.
    """
    sizes: dict[str, int] = {}
    first = device = None
    for (label, letters), tensor in zip(specs, operands, strict=True):
        if tensor is None:
            continue
        if device is None:
            first, device = label, tensor.device
        elif tensor.device != device:
            raise ValueError(
                f"{NAMESPACE}::{name}: {label} is on {tensor.device}, {first} on {device}; "
                "move them to one device"
            )
        shape = tensor.shape
        fits = len(shape) == len(letters)
        for letter, size in zip(letters, shape, strict=False):
            fits = fits and sizes.setdefault(letter, size) == size
        if not fits:
            known = ", ".join(f"{k} = {v}" for k, v in sizes.items() if k in letters)
            wanted = f"({', '.join(letters)})" + (f" with {known}" if known else "")
            raise ValueError(f"{NAMESPACE}::{name}: {label} is {tuple(shape)}, not {wanted}")
    return sizes


def require(condition: bool, name: str, what: str) -> None:
    """Raise the `ValueError` of an operand of `name` that cannot be used."""
    if not condition:
        raise ValueError(f"{NAMESPACE}::{name}: {what}")


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    check: Callable[..., None],
    gradient: tuple[Backward, SetupContext] | None = None,
) -> Callable[..., Any]:
    """Register `<NAMESPACE>::<schema>` and return a callable that takes the shortest way to it.

    Args:
        schema: name, arguments and results in torch's schema language.
        implementation: computes the results on any device; must not return its arguments.
        fake: gives results of the right shape, dtype and device without computing; reached only
            by operands none of which has memory.
        check: raises `ValueError` for operands that cannot be used, before either.
        gradient: `backward` and `setup_context` as of `torch.autograd.Function`; the latter saves
            what the former needs. With gradients enabled, as `create_graph` does, `backward` has to
            compute by what autograd knows, since the gradient is to be differentiated again.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    implementation, fake = _checked(implementation, check), _checked(fake, check)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    direct = implementation
    if gradient is not None:
        backward, setup_context = gradient
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )
        direct = _function(name, implementation, backward, setup_context).apply
    registered = getattr(getattr(torch.ops, NAMESPACE), name).default

    def operator(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _is_watched() or not _are_plain(arguments):
            return registered(*arguments)
        return direct(*arguments)

    return operator


def _checked(compute: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        check(*arguments)
        return compute(*arguments)

    return run


def _function(
    name: str, implementation: Callable[..., Any], backward: Backward, setup_context: SetupContext
) -> Any:
    def forward(ctx: Any, *arguments: Any) -> Any:
        results = implementation(*arguments)
        setup_context(ctx, arguments, results)
        return results

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


def _is_watched() -> bool:
    """Whether a mode, a transform or a tracer has to see every operator."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def _are_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether every tensor is one of torch's own, with memory."""
    return all(
        type(a) in (Tensor, torch.nn.Parameter) and not a.is_meta
        for a in arguments
        if isinstance(a, Tensor)
    )

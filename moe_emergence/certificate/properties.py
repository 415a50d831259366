"""What a path must have besides right numbers: bitwise repeatable, recomputable, light, unblocking.

Letters: T tokens, H model width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_emergence.certificate.arithmetic import Arithmetic
from moe_emergence.certificate.cases import Case
from moe_emergence.certificate.problem import Problem, draw_problem, run_layer
from moe_emergence.cuda_graph import CudaCapture
from moe_emergence.moe import Dispatcher, MoELayer, get_dispatcher


@dataclass(frozen=True)
class Promise:
    """Who must have a property, and in which arithmetics it is asked for."""

    paths: tuple[str, ...]
    """The other paths are only measured."""
    dtypes: tuple[str, ...]


LIGHT = Promise(paths=("fused", "auto", "emergence"), dtypes=("fp32", "bf16", "fp16"))
"""Little memory and no wait for the device; under autocast the cast weights count on both sides."""


class Outcome(NamedTuple):
    """Whether a property holds, and the figure or the reason behind it."""

    holds: bool
    note: str


@dataclass(frozen=True)
class Property:
    """One row of the certificate that is not a comparison with fp64."""

    name: str
    reason: str
    measure: Callable[[Dispatcher, Case, Arithmetic, torch.device, int], Outcome]
    case: Case
    promise: Promise | None = None
    """None for every path in every arithmetic."""


def _repeats(
    dispatcher: Dispatcher, case: Case, arithmetic: Arithmetic, device: torch.device, seed: int
) -> Outcome:
    problem = draw_problem(case, arithmetic, device, seed)
    first = run_layer(case, problem, dispatcher, arithmetic)
    for _ in range(2):
        again = run_layer(case, problem, dispatcher, arithmetic)
        for name, value in first.items():
            if not _same_bits(value, again[name]):
                return Outcome(False, f"{name} differs between two runs")
    return Outcome(True, "bitwise equal")


def _recomputes(
    dispatcher: Dispatcher, case: Case, arithmetic: Arithmetic, device: torch.device, seed: int
) -> Outcome:
    problem = draw_problem(case, arithmetic, device, seed)
    layer = _with_path(problem, dispatcher)
    results = []
    for recompute in (False, True):
        x_TH = problem.x_TH.detach().requires_grad_()
        with arithmetic.active(device):
            if recompute:
                y_TH, _ = checkpoint(layer, x_TH, use_reentrant=False)
            else:
                y_TH, _ = layer(x_TH)
            leaves = [x_TH, *layer.parameters()]
            results.append([y_TH.detach(), *torch.autograd.grad(y_TH, leaves, problem.dy_TH)])
    names = ("y", "x", *dict(layer.named_parameters()))
    for name, plain, recomputed in zip(names, *results, strict=True):
        if not _same_bits(plain, recomputed):
            return Outcome(False, f"{name} differs with activation checkpointing")
    return Outcome(True, "bitwise equal")


def _saves_half(
    dispatcher: Dispatcher, case: Case, arithmetic: Arithmetic, device: torch.device, seed: int
) -> Outcome:
    problem = draw_problem(case, arithmetic, device, seed)
    kept = saved_bytes(_with_path(problem, dispatcher), problem.x_TH)
    whole = saved_bytes(_with_path(problem, get_dispatcher("sequential")), problem.x_TH)
    note = f"{kept / 1e6:.2f} MB kept for backward, sequential {whole / 1e6:.2f} MB"
    return Outcome(kept <= whole / 2, note)


def saved_bytes(layer: MoELayer, x_TH: Tensor) -> int:
    """Bytes of the distinct storages kept for backward, without the parameters'."""
    owned = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_TH, _ = layer(x_TH.detach().requires_grad_())
    assert y_TH.requires_grad
    return sum(kept.values())


def _never_waits(
    dispatcher: Dispatcher, case: Case, arithmetic: Arithmetic, device: torch.device, seed: int
) -> Outcome:
    problem = draw_problem(case, arithmetic, device, seed)
    layer = _with_path(problem, dispatcher)
    x_TH = problem.x_TH.detach().requires_grad_()
    with arithmetic.active(device):
        _forward_backward(layer, x_TH, problem.dy_TH)  # compiles, tunes, allocates
        torch.cuda.synchronize(device)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            _forward_backward(layer, x_TH, problem.dy_TH)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return Outcome(False, str(error).splitlines()[0])
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return Outcome(True, "no host synchronisation")


def _captures(
    dispatcher: Dispatcher, case: Case, arithmetic: Arithmetic, device: torch.device, seed: int
) -> Outcome:
    """Captured on one batch and replayed on another, which routes its tokens differently."""
    problem = draw_problem(case, arithmetic, device, seed)
    layer = _with_path(problem, dispatcher)
    x_TH = problem.x_TH.detach().clone().requires_grad_()
    with arithmetic.active(device):
        capture = CudaCapture(device)
        for _ in range(3):
            capture.rehearse(lambda: _forward_backward(layer, x_TH, problem.dy_TH))
        replay = capture.record(lambda: _forward_backward(layer, x_TH, problem.dy_TH))
        with torch.no_grad():
            x_TH.copy_(problem.x_TH.flip(0) * 0.5)
        replayed = replay()
        eager = _forward_backward(layer, x_TH.detach().clone().requires_grad_(), problem.dy_TH)
        torch.cuda.synchronize(device)
    for name, a, b in zip(
        ("y", "x", *dict(layer.named_parameters())), eager, replayed, strict=True
    ):
        if not _same_bits(a, b):
            return Outcome(False, f"{name} of the replayed graph differs from eager")
    return Outcome(True, "replay equals eager, bitwise")


def _forward_backward(layer: MoELayer, x_TH: Tensor, dy_TH: Tensor) -> list[Tensor]:
    y_TH, _ = layer(x_TH)
    return [y_TH.detach(), *torch.autograd.grad(y_TH, [x_TH, *layer.parameters()], dy_TH)]


def _with_path(problem: Problem, dispatcher: Dispatcher) -> MoELayer:
    problem.layer.dispatch = dispatcher
    return problem.layer


def _same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def properties(device: torch.device) -> list[Property]:
    """The rows that `device` can have."""
    top_1 = Case("top-1", "", 512, 64, 128, 8, 1)
    top_2 = Case("top-2", "", 512, 64, 128, 8, 2)
    top_8 = Case("top-8", "", 512, 32, 32, 16, 8, activation="swiglu")
    real = Case("realistic", "", 512, 192, 768, 8, 1)
    swiglu = Case("realistic", "", 512, 192, 768, 8, 2, activation="swiglu")
    atomics, recomputation = "sums by atomics differ from run to run", "recomputing routes alike"
    rows = [
        Property("repeat top-1", atomics, _repeats, top_1),
        Property("repeat top-2", atomics, _repeats, top_2),
        Property("repeat top-8", atomics, _repeats, top_8),
        Property("checkpoint top-1", recomputation, _recomputes, top_1),
        Property("checkpoint top-2", recomputation, _recomputes, top_2),
        Property("memory", "at most half of what sequential keeps", _saves_half, real, LIGHT),
        Property("memory SwiGLU", "the same with top-2", _saves_half, swiglu, LIGHT),
    ]
    if device.type == "cuda":
        rows += [
            Property("no sync top-1", "the host must not wait", _never_waits, real, LIGHT),
            Property("no sync top-2", "the host must not wait", _never_waits, swiglu, LIGHT),
            Property("CUDA graph top-1", "one capture, any routing", _captures, real, LIGHT),
            Property("CUDA graph top-2", "one capture, any routing", _captures, swiglu, LIGHT),
        ]
    return rows

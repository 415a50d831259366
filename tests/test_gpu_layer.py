"""The layer on a GPU: right in every precision, asynchronous, capturable, repeatable, lean.

Letters: T tokens, H model width, F expert width, E experts, K experts per token.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from numerics import FP64, assert_as_accurate, assert_close, choose, randn, saved_bytes, seeded
from torch import Tensor

from moe_emergence.moe import (
    Experts,
    MoELayer,
    RouterDecision,
    RouterNoise,
    auxiliary_losses,
    get_dispatcher,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ACTIVATIONS = ("gelu_tanh", "swiglu")
SHAPES = {
    # T, H, F, E, K, how tokens choose
    "predecessor-top-1": (1024, 768, 3072, 8, 1, "random"),
    "predecessor-top-2": (1024, 768, 3072, 8, 2, "random"),
    "many-tokens": (16384, 768, 3072, 8, 2, "random"),
    "odd-everything": (131, 75, 197, 6, 3, "random"),
    "one-token": (1, 64, 128, 4, 2, "random"),
    "one-expert-takes-all": (500, 72, 136, 5, 1, "same"),
    "empty-experts": (500, 64, 128, 33, 2, "few"),
}


class Precision(NamedTuple):
    """How numbers are kept and multiplied."""

    dtype: torch.dtype
    matmul: str = "highest"
    autocast: bool = False


PRECISIONS = {
    "fp32": Precision(torch.float32),
    "tf32": Precision(torch.float32, "high"),
    "bf16": Precision(torch.bfloat16),
    "fp16": Precision(torch.float16),
    "autocast": Precision(torch.bfloat16, autocast=True),
}


@pytest.fixture(autouse=True)
def _global_settings() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
    torch.cuda.set_sync_debug_mode("default")


def normal(*shape: int, seed: int) -> Tensor:
    return randn(*shape, seed=seed).cuda()


def compute(
    name: str, experts: Experts, x: Tensor, weights: Tensor, chosen: Tensor, dy: Tensor, cast: bool
) -> dict[str, Tensor]:
    """Output and every gradient of one dispatcher."""
    experts.zero_grad()
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    probs = torch.full((len(x), experts.num_experts), 1 / experts.num_experts, device="cuda")
    decision = RouterDecision(probs.log(), probs, probs, chosen, weights)
    with torch.autocast("cuda", torch.bfloat16, enabled=cast):
        y = get_dispatcher(name)(x, decision.topk_experts, decision.topk_weights, experts)
    y.backward(dy.to(y.dtype))
    gradients = {key: parameter.grad.clone() for key, parameter in experts.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad, **gradients}


def rounded_to_tf32(tensor: Tensor) -> Tensor:
    """The nearest numbers with ten bits behind the point, ties away from zero."""
    return ((tensor.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def without_tensor_cores(experts: Experts, x: Tensor, dy: Tensor) -> tuple[Experts, Tensor, Tensor]:
    """What a tensor core would have made of these factors, for the plain path to multiply.

    Libraries multiply a row alone in full fp32, which is no yardstick for tf32.
    """
    experts = copy.deepcopy(experts)
    with torch.no_grad():
        for parameter in (experts.w1, experts.w2):
            parameter.copy_(rounded_to_tf32(parameter))
    return experts, rounded_to_tf32(x), rounded_to_tf32(dy)


def assert_dispatcher_as_accurate_as_sequential(name, shape, precision, activation) -> None:
    tokens, hidden, width, num_experts, top_k, kind = shape
    torch.set_float32_matmul_precision(precision.matmul)
    kept = torch.float32 if precision.autocast else precision.dtype
    draws = []
    # the ratio of two errors needs many numbers
    for seed in range(2 if tokens > 100 else 48):
        experts = Experts(num_experts, hidden, width, activation).cuda().to(kept)
        with torch.no_grad():
            for i, parameter in enumerate(experts.parameters()):
                fan_in = parameter.shape[1] if parameter.ndim == 3 else 1
                parameter.copy_(normal(*parameter.shape, seed=10 * seed + i) / fan_in**0.5)
        x = normal(tokens, hidden, seed=10 * seed + 7).to(kept)
        dy = normal(tokens, hidden, seed=10 * seed + 8).to(precision.dtype)
        weights = 0.1 + torch.rand(tokens, top_k, generator=seeded(seed)).cuda()
        chosen = choose(tokens, num_experts, top_k, kind, seed).cuda()
        ours = compute(name, experts, x, weights, chosen, dy, precision.autocast)
        row_alone = precision.matmul == "high" and tokens == 1
        e, row, drow = without_tensor_cores(experts, x, dy) if row_alone else (experts, x, dy)
        plain = compute("sequential", e, row, weights, chosen, drow, precision.autocast)
        exact = compute(
            "sequential",
            copy.deepcopy(experts).double(),
            x.to(FP64),
            weights.to(FP64),
            chosen,
            dy.to(FP64),
            cast=False,
        )
        draws.append((ours, plain, exact))
    assert_as_accurate(draws, precision.dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fused_is_as_accurate_as_sequential(shape, precision, activation) -> None:
    assert_dispatcher_as_accurate_as_sequential("fused", shape, precision, activation)


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_megablocks_is_as_accurate_as_sequential(top_k, precision) -> None:
    pytest.importorskip("megablocks.ops")
    shape = SHAPES[f"predecessor-top-{top_k}"]
    assert_dispatcher_as_accurate_as_sequential("megablocks", shape, precision, "gelu_tanh")


def make_layer(top_k: int, activation: str = "gelu_tanh", dtype=torch.bfloat16) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(128, 256, 8, top_k, activation=activation, dispatch="fused").cuda()
    layer.experts.to(dtype)
    return layer


def results_of(layer, x: Tensor, dy: Tensor, noise: RouterNoise | None = None) -> list[Tensor]:
    """Output and gradients, without going through `.grad`."""
    y, decision = layer(x, noise)
    balance, z = auxiliary_losses([decision])
    loss = (y * dy).sum() + 0.3 * balance + 0.2 * z
    return [y.detach(), *torch.autograd.grad(loss, [x, *layer.parameters()])]


def tokens_and_gradient(dtype=torch.bfloat16, seed: int = 0) -> tuple[Tensor, Tensor]:
    x, dy = (normal(4, 250, 128, seed=seed + i).to(dtype) for i in range(2))
    return x.requires_grad_(), dy


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("noise", [None, RouterNoise(0.5, 1, 2)], ids=["plain", "noisy"])
def test_the_host_never_waits(noise, top_k, activation) -> None:
    layer, (x, dy) = make_layer(top_k, activation), tokens_and_gradient()
    results_of(layer, x, dy, noise)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    results_of(layer, x, dy, noise)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_captured_graph_replays_other_routings(top_k, activation) -> None:
    layer, (x, dy) = make_layer(top_k, activation), tokens_and_gradient()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            results_of(layer, x, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results_of(layer, x, dy)
    for seed in (10, 20):
        other_x, other_dy = tokens_and_gradient(seed=seed)
        if seed == 20:
            other_x = other_x.detach()[:1, :1].expand_as(x)  # one expert (or two) takes all
        with torch.no_grad():
            x.copy_(other_x)
        dy.copy_(other_dy)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for found, expected in zip(replayed, results_of(layer, x, dy), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_two_runs_are_bitwise_equal(top_k, dtype) -> None:
    layer, (x, dy) = make_layer(top_k, dtype=dtype), tokens_and_gradient(dtype)
    first = results_of(layer, x, dy)
    for _ in range(8):
        for found, expected in zip(results_of(layer, x, dy), first, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_fused_keeps_at_most_half_of_what_sequential_keeps(autocast, top_k, activation) -> None:
    layer = MoELayer(768, 3072, 8, top_k, activation=activation).cuda()
    x = normal(1024, 768, seed=0).float().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        fused, sequential = (saved_bytes(name, layer, x) for name in ("fused", "sequential"))
    assert fused <= sequential / 2, f"{fused / 1e6:.2f} MB against {sequential / 1e6:.2f} MB"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_compiled_by_inductor_in_one_graph(top_k, activation) -> None:
    torch.compiler.reset()
    layer = make_layer(top_k, activation, torch.float32)
    x, dy = tokens_and_gradient(torch.float32)
    names = ["y", "x", *dict(layer.named_parameters())]
    expected = dict(zip(names, results_of(layer, x, dy), strict=True))
    compiled = torch.compile(layer, fullgraph=True)
    found = dict(zip(names, results_of(compiled, x, dy), strict=True))
    assert_close(found, expected, 1e-4)

"""The layer under `torch.compile`, in one graph, and the operator's registration.

`aot_eager` traces forward and backward as inductor would and needs no compiler.
"""

from collections.abc import Iterator

import pytest
import torch
from numerics import FP64, assert_close, poisoned_empty, randn

from emergence_kernels import sort_by_expert
from emergence_kernels.activations import pre_activation_width
from moe_emergence.moe import MoELayer, RouterNoise, auxiliary_losses

ACTIVATIONS = ("gelu_tanh", "swiglu")


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def results_of(module, layer: MoELayer, x, noise, dy) -> dict[str, torch.Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y, decision = module(x, noise)
    balance, z = auxiliary_losses([decision])
    ((y * dy).sum() + 0.3 * balance + 0.2 * z).backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("top_k", "noise"),
    [(1, RouterNoise(0.5, 1, 2)), (2, None)],
    ids=["top-1-noisy", "top-2"],
)
def test_one_graph_with_the_same_results(activation, top_k, noise) -> None:
    layer = MoELayer(6, 8, 5, top_k, activation=activation, dispatch="fused").double()
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=10 + i))
    x, dy = randn(3, 7, 6, seed=1), randn(3, 7, 6, seed=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = results_of(layer, layer, x, noise, dy)
    assert_close(results_of(compiled, layer, x, noise, dy), expected)
    # other numbers, other experts, another number of tokens
    x, dy = randn(2, 11, 6, seed=3), randn(2, 11, 6, seed=4)
    expected = results_of(layer, layer, x, noise, dy)
    assert_close(results_of(compiled, layer, x, noise, dy), expected)


def operands(activation: str, biases: bool, wanted: tuple[int, ...]) -> tuple:
    """Arguments of `emergence_kernels::expert_mlp`; `wanted` are those with a gradient."""
    pre = pre_activation_width(activation, 5)
    shapes = [(7, 4), (7, 2), (3, 4, pre), (3, pre), (3, 5, 4), (3, 4)]
    tensors = [randn(*shape, seed=i).requires_grad_(i in wanted) for i, shape in enumerate(shapes)]
    if not biases:
        tensors[3] = tensors[5] = None
    chosen = torch.tensor([[0, 2], [2, 0]]).repeat(4, 1)[:7]
    return (*tensors, *sort_by_expert(chosen, 3), activation, "")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("biases", "wanted"),
    [(True, (0, 1, 2, 3, 4, 5)), (False, (0, 1, 2, 4)), (True, (0, 1))],
    ids=["everything", "no-biases", "frozen-experts"],
)
def test_the_operators_are_registered_as_torch_wants_them(activation, biases, wanted) -> None:
    arguments = operands(activation, biases, wanted)
    torch.library.opcheck(torch.ops.emergence_kernels.expert_mlp.default, arguments)
    arguments = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    *tensors, activation, plan = arguments
    _, pre = torch.ops.emergence_kernels.expert_mlp(*arguments)
    given = [i in wanted for i in range(6)]
    torch.library.opcheck(
        torch.ops.emergence_kernels.expert_mlp_backward.default,
        (randn(7, 4, seed=9), *tensors[:6], pre, *tensors[6:], activation, plan, given),
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [0, 7])
def test_traced_shapes_and_dtypes_are_those_computed(tokens, activation) -> None:
    """Also for x whose strides a result must not inherit."""
    from torch._subclasses import FakeTensorMode

    *tensors, activation, plan = operands(activation, True, ())
    tensors[0] = randn(4, 7)[:, :tokens].t()
    chosen = torch.zeros(tokens, 2, dtype=torch.long)
    tensors[1] = randn(2, 7)[:, :tokens].t()
    tensors[6:] = sort_by_expert(chosen, 3)
    dy = randn(tokens, 4, dtype=FP64)

    def both(tensors, dy):
        y, pre = torch.ops.emergence_kernels.expert_mlp(*tensors, activation, plan)
        gradients = torch.ops.emergence_kernels.expert_mlp_backward(
            dy, *tensors[:6], pre, *tensors[6:], activation, plan, [True] * 6
        )
        return [y, pre, *gradients]

    with poisoned_empty():
        computed = both(tensors, dy)
    with FakeTensorMode() as mode:
        traced = both([mode.from_tensor(t) for t in tensors], mode.from_tensor(dy))
    for found, expected in zip(traced, computed, strict=True):
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        assert found.stride() == expected.stride()

"""Gradients that are differentiated again: Hessian-vector products, penalties on gradients.

Letters: see `emergence_kernels.reference`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import FP64, choose, randn
from torch import Tensor
from torch.autograd import gradgradcheck
from transformers import GPT2Config, GPT2LMHeadModel

import emergence_kernels
from moe_emergence.models import MoEGPT2LMHeadModel, upcycle
from moe_emergence.moe import MoELayer, RouterNoise, auxiliary_losses
from moe_emergence.training.objective import NextTokenLoss, next_token_losses

T, H, F, E = 5, 3, 4, 3


def experts_of(activation: str, *, biases: bool) -> tuple[Tensor | None, ...]:
    pre = 2 * F if activation == "swiglu" else F
    shapes = ((E, H, pre), (E, pre), (E, F, H), (E, H))
    parameters = [randn(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    return tuple(p if biases or i % 2 == 0 else None for i, p in enumerate(parameters))


def registered(*arguments: Any) -> Tensor:
    """The operator by the way that compilers and modes take."""
    *tensors, permutation, activation = arguments
    return torch.ops.emergence_kernels.expert_mlp(*tensors, *permutation, activation, "")[0]


@pytest.mark.parametrize("run", [emergence_kernels.expert_mlp, registered])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_of_the_experts(
    top_k: int, activation: str, biases: bool, run: Callable[..., Tensor]
) -> None:
    permutation = emergence_kernels.sort_by_expert(choose(T, E, top_k, "random", 3), E)
    weights = torch.rand(T, top_k, dtype=FP64).requires_grad_()
    inputs = [randn(T, H, seed=9).requires_grad_(), weights, *experts_of(activation, biases=biases)]
    given = [i for i, tensor in enumerate(inputs) if tensor is not None]

    def function(*tensors: Tensor) -> Tensor:
        all_of_them = dict(zip(given, tensors, strict=True))
        return run(*(all_of_them.get(i) for i in range(6)), permutation, activation)

    assert gradgradcheck(function, [inputs[i] for i in given])


def test_of_experts_whose_inputs_depend_on_each_other() -> None:
    """Routing weights come from the tokens, and here the weights of the experts do too."""
    permutation = emergence_kernels.sort_by_expert(choose(T, E, 2, "random", 3), E)
    w1, b1, w2, b2 = experts_of("gelu_tanh", biases=True)

    def function(x: Tensor) -> Tensor:
        weights = (x[:, :2] * 2).sigmoid()
        return emergence_kernels.expert_mlp(
            x.sin(), weights, w1 * x.mean(), b1, w2, b2 * x.sum(), permutation, "gelu_tanh"
        )

    x = randn(T, H, seed=9).requires_grad_()
    assert torch.autograd.gradcheck(function, x)
    assert gradgradcheck(function, x)


@pytest.mark.parametrize("part", ["probs_TE", "noisy_probs_TE", "weights_TK", "logsumexp_T",
                                  "prob_sums_E", "z_sum"])  # fmt: skip
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_of_the_routing(top_k: int, noisy: bool, part: str) -> None:
    noise = randn(T, E, seed=1) if noisy else None

    def function(logits: Tensor) -> Tensor:
        found: Tensor = getattr(emergence_kernels.route(logits, top_k, noise), part)
        return found

    assert gradgradcheck(function, randn(T, E, seed=2).requires_grad_())


def test_of_a_tied_head() -> None:
    """The hidden states depend on the head, as those of GPT-2 do."""
    ids = torch.tensor([[1, 4, 2, 0], [3, 3, 1, 2]])

    def function(head: Tensor) -> Tensor:
        return next_token_losses(head[ids].sin(), head * 2, ids)

    head = randn(5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(function, head)
    assert gradgradcheck(function, head)


def model_of(router: Any, top_k: int) -> MoEGPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=31, n_positions=16, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = upcycle(GPT2LMHeadModel(config), [0, 1], 3, top_k, router=router, noise=0.5)
    model.config._attn_implementation = "eager"  # torch's fused attention has no second derivative
    return model.double().train()


@pytest.mark.parametrize(("router", "top_k"), [("learned", 1), ("learned", 2), ("frozen", 1),
                                               ("hash", 2)])  # fmt: skip
def test_of_a_whole_model_by_either_path(router: Any, top_k: int) -> None:
    """Every parameter's gradient and Hessian-vector product, auxiliary losses included."""
    model = model_of(router, top_k)
    ids = torch.randint(0, 31, (2, 7), generator=torch.Generator().manual_seed(1))
    parameters = [p for p in model.parameters() if p.requires_grad]
    directions = [randn(*p.shape, seed=i) for i, p in enumerate(parameters)]
    found: dict[tuple[str, bool], list[Tensor]] = {}
    products = {}
    for path in ("sequential", "fused"):
        model.set_dispatch(path)
        for again in (False, True):
            losses, decisions = NextTokenLoss(model)(ids, RouterNoise(0.3, 1, 2))
            balance, z = auxiliary_losses(decisions)
            loss = losses.mean() + balance + z
            found[path, again] = list(torch.autograd.grad(loss, parameters, create_graph=again))
        slope = sum((g * d).sum() for g, d in zip(found[path, True], directions, strict=True))
        products[path] = torch.autograd.grad(slope, parameters, allow_unused=True)
    for gradients in found.values():
        for gradient, expected in zip(gradients, found["sequential", False], strict=True):
            torch.testing.assert_close(gradient.detach(), expected, rtol=1e-9, atol=1e-12)
    assert any(p is not None and p.abs().max() > 1e-3 for p in products["fused"])
    for ours, theirs in zip(products["fused"], products["sequential"], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


def test_functional_hvp_of_a_layer() -> None:
    layer = MoELayer(4, 8, 3, 2).double()
    layer.experts.reset_parameters(std=0.5)
    x, direction = randn(6, 4), randn(6, 4, seed=1)
    products = []
    for path in ("sequential", "fused"):
        layer.dispatch = path
        _, product = torch.autograd.functional.hvp(
            lambda tokens: layer(tokens)[0].square().sum(), x, direction
        )
        products.append(product)
    assert products[0].abs().max() > 1e-3
    torch.testing.assert_close(products[1], products[0], rtol=1e-9, atol=1e-12)

"""A linear layer per expert: the operator, its kernels, and rows without an expert."""

import pytest
import torch
from conftest import KERNEL_DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import STRUCTURE, group_sizes, offsets_of, plans, surrounded
from numerics import FP64, assert_close, poisoned_empty, randn

from emergence_kernels import expert_mlp, grouped_linear, reference

WIDTHS = st.sampled_from([1, 5, 8, 17, 24])


def make(sizes, inner, outer, transposed, absent, dtype=FP64, bias=True):
    """Rows, weight, bias, offsets and an upstream gradient; `absent` rows have no expert."""
    rows, experts = sum(sizes) + absent, len(sizes)
    w = randn(experts, inner, outer, seed=1).to(dtype)
    w = w.mT.contiguous().mT if transposed else w
    b = randn(experts, outer, seed=2).to(dtype) if bias else None
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    return randn(rows, inner).to(dtype), w, b, offsets, randn(rows, outer, seed=3).to(dtype)


def twin(x, w, b, offsets):
    return reference.grouped_gemm(x, w, offsets, b)


def both_ways(x, w, b, offsets, dy):
    """Results and gradients of the operator and of its twin, in fp64."""
    results = []
    for function in (grouped_linear, twin):
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, w, b)]
        y = function(*leaves, offsets)
        given_ = [t for t in leaves if t is not None]
        gradients = torch.autograd.grad(y, given_, dy)
        names = [n for n, t in zip("xwb", leaves, strict=True) if t is not None]
        results.append({"y": y.detach(), **dict(zip(names, gradients, strict=True))})
    return results


@given(group_sizes(), WIDTHS, WIDTHS, st.booleans(), st.booleans(), st.sampled_from([0, 0, 1, 19]))
@settings(max_examples=40)
def test_it_is_its_twin(sizes, inner, outer, transposed, bias, absent) -> None:
    case = make(sizes, inner, outer, transposed, absent, bias=bias)
    with poisoned_empty():
        found, expected = both_ways(*case)
    assert_close(found, expected)
    assert found["w"].stride() == case[1].stride() or 1 in case[1].shape
    assert not found["y"][sum(sizes) :].any()
    assert not found["x"][sum(sizes) :].any()


@given(group_sizes(), WIDTHS, WIDTHS, st.booleans(), plans(), st.sampled_from([0, 0, 1, 19]))
@settings(max_examples=15)
def test_its_kernels_are_its_twin(sizes, inner, outer, transposed, plan, absent) -> None:
    pytest.importorskip("triton")
    from emergence_kernels.gpu import grouped_linear as kernels

    x, w, b, _, dy = make(sizes, inner, outer, False, absent, torch.float32)
    offsets = offsets_of(sizes)
    given_ = [surrounded(x), surrounded(w.mT.contiguous()).mT if transposed else surrounded(w)]
    with poisoned_empty(guarded=True):
        y = kernels.forward(*given_, surrounded(b), offsets, plan)
        gradients = kernels.backward(
            surrounded(dy), *given_, offsets, torch.float32, (True, True, True), plan
        )
    found = {"y": y, **dict(zip("xwb", gradients, strict=True))}
    exact = both_ways(
        *(t.to(KERNEL_DEVICE, FP64) for t in (x, w, b)), offsets, dy.to(y.device, FP64)
    )
    rounded = {n: t.to(y.dtype) for n, t in exact[1].items()}
    assert_close(found, rounded, STRUCTURE[torch.float32], least=1)


def test_gradients_are_differentiable() -> None:
    x, w, b, offsets, _ = make([2, 0, 3], 3, 4, True, 1)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    assert torch.autograd.gradcheck(lambda *t: grouped_linear(*t, offsets), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: grouped_linear(*t, offsets), leaves)


@pytest.mark.parametrize("transposed", [False, True])
def test_it_is_one_opaque_step(transposed) -> None:
    x, w, b, offsets, _ = make([2, 0, 3], 3, 4, transposed, 1, torch.float32)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    torch.library.opcheck(torch.ops.emergence_kernels.grouped_linear.default, (*leaves, offsets))


def test_under_autocast_weights_keep_their_dtype() -> None:
    x, w, b, offsets, dy = make([2, 0, 3], 8, 4, False, 0, torch.float32)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(*leaves, offsets)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y, leaves, dy.bfloat16())
    assert {g.dtype for g in gradients} == {torch.float32}


def test_operands_that_do_not_fit_are_named() -> None:
    x, w, b, offsets, _ = make([2, 3], 8, 4, False, 0, torch.float32)
    with pytest.raises(ValueError, match=r"rows are torch\.float32, weights"):
        grouped_linear(x, w.double(), b, offsets)
    with pytest.raises(ValueError, match="grouped_linear: w is"):
        grouped_linear(x[:, :5], w, b, offsets)
    with pytest.raises(ValueError, match="expert_offsets is not"):
        grouped_linear(x, w, b, offsets[:-1])
    with pytest.raises(ValueError, match="expert_offsets is not"):
        grouped_linear(x, w, b, offsets.long())


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_fused_operator_takes_the_same_layouts_and_absent_experts(
    activation, transposed
) -> None:
    tokens, top_k, experts, hidden, width = 13, 2, 3, 5, 4
    pre = 2 * width if activation == "swiglu" else width
    chosen = torch.stack([torch.randperm(experts + 1)[:top_k] for _ in range(tokens)])
    chosen[0] = torch.tensor([experts, 0])
    sort = reference.sort_by_expert(chosen, experts + 1)
    permutation = sort._replace(expert_offsets=sort.expert_offsets[:-1].contiguous())

    def weight(seed, *shape):
        drawn = randn(*shape, seed=seed)
        return drawn.mT.contiguous().mT if transposed else drawn

    leaves = [
        tensor.requires_grad_()
        for tensor in (
            randn(tokens, hidden), randn(tokens, top_k, seed=1), weight(2, experts, hidden, pre),
            randn(experts, pre, seed=3), weight(4, experts, width, hidden),
            randn(experts, hidden, seed=5),
        )
    ]  # fmt: skip
    dy = randn(tokens, hidden, seed=6)
    with poisoned_empty():
        y = expert_mlp(*leaves, permutation, activation)
        found = torch.autograd.grad(y, leaves, dy)
    twin = reference.expert_mlp(*leaves, permutation, activation)
    expected = torch.autograd.grad(twin, leaves, dy)
    names = ("x", "weights", "w1", "b1", "w2", "b2")
    assert_close(
        {"y": y.detach(), **dict(zip(names, found, strict=True))},
        {"y": twin.detach(), **dict(zip(names, expected, strict=True))},
    )
    assert not found[1][chosen == experts].any()
    assert found[2].stride() == leaves[2].stride()

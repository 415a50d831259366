"""The operators against their plain-torch twins and against loops."""

from unittest import mock

import pytest
import torch
from conftest import KERNEL_DEVICE
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numerics import poisoned_empty, randn

import emergence_kernels
from emergence_kernels import reference
from emergence_kernels.activations import activate, activate_backward, pre_activation_width
from emergence_kernels.grouped_gemm import grouped_sum, rows_of_experts

ACTIVATIONS = ("gelu_tanh", "swiglu")


def close(ours: torch.Tensor | None, theirs: torch.Tensor | None, tolerance: float = 1e-10) -> None:
    """Largest difference relative to the largest value, both finite."""
    assert (ours is None) == (theirs is None)
    if ours is None or theirs is None:
        return
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert ours.isfinite().all()
    if theirs.numel():
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


GROUPS = st.lists(st.sampled_from([0, 0, 1, 2, 3, 7, 17]), min_size=1, max_size=9)
WIDTHS = st.integers(1, 11)


def offsets_of(sizes: list[int]) -> torch.Tensor:
    return torch.tensor([sum(sizes[:e]) for e in range(len(sizes) + 1)], dtype=torch.int32)


@st.composite
def chosen_experts(draw) -> tuple[torch.Tensor, int]:
    experts = draw(st.integers(1, 9), label="experts")
    top_k = draw(st.integers(1, experts), label="top_k")
    tokens = draw(st.integers(0, 40), label="tokens")
    seed = draw(st.integers(0, 10_000), label="seed")
    kind = draw(st.sampled_from(["random", "same", "few"]), label="kind")
    generator = torch.Generator().manual_seed(seed)
    # all tokens alike, experts from the first K+1 only, or anything
    pool = {"random": experts, "few": min(top_k + 1, experts), "same": experts}[kind]
    rows = 1 if kind == "same" else tokens
    scores = torch.rand(rows, pool, generator=generator)
    chosen = scores.argsort(dim=1)[:, :top_k]
    return (chosen.expand(tokens, top_k) if kind == "same" else chosen), experts


class TestSortByExpert:
    @given(chosen_experts(), st.booleans())
    @settings(max_examples=60)
    def test_it_equals_its_twin_and_keeps_its_invariants(self, routing, transposed) -> None:
        chosen, experts = routing
        if transposed:
            chosen = chosen.t().contiguous().t()
        with poisoned_empty():
            ours = emergence_kernels.sort_by_expert(chosen, experts)
        theirs = reference.sort_by_expert(chosen, experts)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        tokens, top_k = chosen.shape
        rows = tokens * top_k
        assert ours.expert_offsets.dtype == torch.int32
        assert ours.expert_offsets[0] == 0
        assert ours.expert_offsets[-1] == rows
        assert torch.equal(ours.perm[ours.inv_perm], torch.arange(rows))
        assert torch.equal(ours.inv_perm[ours.perm], torch.arange(rows))
        assert torch.equal(ours.token_idx, ours.perm // top_k)
        flat = chosen.reshape(-1)
        for e in range(experts):
            mine = ours.perm[ours.expert_offsets[e] : ours.expert_offsets[e + 1]]
            assert (flat[mine] == e).all()
            assert (mine[1:] > mine[:-1]).all()  # stable: slots of an expert stay in order

    def test_equal_keys_stay_in_order_beyond_the_size_of_small_sorts(self) -> None:
        chosen = (torch.arange(20_000) % 3).flip(0)[:, None]
        ours = emergence_kernels.sort_by_expert(chosen, 4)
        assert ours.expert_offsets.tolist() == [0, 6667, 13334, 20000, 20000]
        for a, b in ((0, 6667), (6667, 13334), (13334, 20000)):
            assert (ours.perm[a:b].diff() > 0).all()

    @given(chosen_experts(), st.integers(2, 5))
    @example((torch.arange(600)[:, None] * 7 % 5, 6), 2)  # pieces of which some have no slots
    @settings(max_examples=25)
    def test_blocks_of_several_pieces_equal_the_plain_path(self, routing, most_blocks) -> None:
        """Pieces of 16 slots and at most five blocks: a few slots are as millions otherwise."""
        pytest.importorskip("triton")
        from emergence_kernels.gpu import permutation

        chosen, experts = routing
        sizes = {"_MOST_BLOCKS": most_blocks, "_ONE_HOT_ELEMENTS": 16}
        with mock.patch.multiple(permutation, **sizes), poisoned_empty(guarded=True):
            ours = permutation.sort_by_expert(chosen.to(KERNEL_DEVICE).contiguous(), experts)
        theirs = emergence_kernels.sort_by_expert(chosen, experts)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.cpu(), b)


class TestGroupedProducts:
    @given(GROUPS, WIDTHS, WIDTHS, st.booleans(), st.booleans())
    @settings(max_examples=50)
    def test_products_and_their_gradients_match_the_twin(
        self, sizes, inner, outer, bias, transposed
    ) -> None:
        offsets, rows, experts = offsets_of(sizes), sum(sizes), len(sizes)
        x_SI = randn(rows, inner, seed=1).requires_grad_()
        w_EIO = randn(experts, inner, outer, seed=2).requires_grad_()
        b_EO = randn(experts, outer, seed=3).requires_grad_() if bias else None
        dy_SO = randn(rows, outer, seed=4)
        if transposed:
            dy_SO = dy_SO.t().contiguous().t()
        y_SO = reference.grouped_gemm(x_SI, w_EIO, offsets, b_EO)
        inputs = [t for t in (x_SI, w_EIO, b_EO) if t is not None]
        gradients = torch.autograd.grad(y_SO, inputs, dy_SO)
        with torch.no_grad(), poisoned_empty():
            close(emergence_kernels.grouped_gemm(x_SI, w_EIO, offsets, b_EO), y_SO)
            close(emergence_kernels.grouped_gemm_dx(dy_SO, w_EIO, offsets), gradients[0])
            close(emergence_kernels.grouped_gemm_dw(x_SI, dy_SO, offsets), gradients[1])
            if bias:
                close(grouped_sum(dy_SO, offsets), gradients[2])

    @given(GROUPS, WIDTHS)
    @settings(max_examples=30)
    def test_rows_of_experts_and_grouped_sum_match_a_loop(self, sizes, width) -> None:
        offsets, rows = offsets_of(sizes), sum(sizes)
        table = randn(len(sizes), width)
        expected = [table[e] for e, size in enumerate(sizes) for _ in range(size)]
        found = rows_of_experts(table, offsets, rows)
        assert torch.equal(found, torch.stack(expected) if rows else table[:0])
        y_SO = randn(rows, width, seed=1)
        with poisoned_empty():
            sums = grouped_sum(y_SO, offsets)
        close(sums, torch.stack([part.sum(0) for part in y_SO.split(sizes)]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_sums_are_accumulated_in_fp32(self, dtype) -> None:
        """4,096 ones: bf16 alone stops at 256, fp16 at 2,048."""
        ones = torch.ones(4096, 3, dtype=dtype)
        offsets = torch.tensor([0, 0, 4096], dtype=torch.int32)
        assert grouped_sum(ones, offsets).tolist() == [[0] * 3, [4096] * 3]
        dw = emergence_kernels.grouped_gemm_dw(ones, ones[:, :2], offsets)
        assert dw.dtype == dtype
        assert dw.tolist() == [[[0] * 2] * 3, [[4096] * 2] * 3]
        y = emergence_kernels.grouped_gemm(
            torch.ones(2, 4096, dtype=dtype),
            torch.ones(2, 4096, 3, dtype=dtype),
            torch.tensor([0, 1, 2], dtype=torch.int32),
        )
        assert y.tolist() == [[4096] * 3] * 2


class TestActivations:
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_the_hand_written_derivative_is_that_of_autograd(self, activation) -> None:
        pre = (3 * randn(13, pre_activation_width(activation, 6))).requires_grad_()
        grad = randn(13, 6, seed=1)
        (expected,) = torch.autograd.grad(activate(pre, activation), pre, grad)
        with poisoned_empty():
            close(activate_backward(grad, pre.detach(), activation)[1], expected)

    def test_gelu_is_that_of_gpt_2(self) -> None:
        from transformers.activations import ACT2FN

        x = 3 * randn(100)
        close(activate(x, "gelu_tanh"), ACT2FN["gelu_new"](x))

    def test_swiglu_gates_with_the_first_half(self) -> None:
        gate, up = randn(4, 5), randn(4, 5, seed=1)
        expected = gate / (1 + torch.exp(-gate)) * up
        close(activate(torch.cat([gate, up], dim=1), "swiglu"), expected)


@st.composite
def mlp_cases(draw):
    chosen, experts = draw(chosen_experts())
    hidden, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    activation = draw(st.sampled_from(ACTIVATIONS))
    biases = draw(st.sampled_from([(True, True), (False, False), (True, False), (False, True)]))
    return chosen, experts, hidden, width, activation, biases


class TestExpertMLP:
    @given(mlp_cases())
    @settings(max_examples=60)
    def test_it_equals_its_twin_in_value_and_every_gradient(self, case) -> None:
        chosen, experts, hidden, width, activation, (bias1, bias2) = case
        tokens, top_k = chosen.shape
        assume(tokens > 0)  # see test_no_tokens
        pre = pre_activation_width(activation, width)
        inputs = [
            randn(tokens, hidden, seed=1),
            randn(tokens, top_k, seed=2),
            randn(experts, hidden, pre, seed=3),
            randn(experts, pre, seed=4) if bias1 else None,
            randn(experts, width, hidden, seed=5),
            randn(experts, hidden, seed=6) if bias2 else None,
        ]
        for tensor in inputs:
            if tensor is not None:
                tensor.requires_grad_()
        leaves = [tensor for tensor in inputs if tensor is not None]
        dy_TH = randn(tokens, hidden, seed=7)
        permutation = reference.sort_by_expert(chosen, experts)
        theirs = reference.expert_mlp(*inputs, permutation, activation)
        expected = torch.autograd.grad(theirs, leaves, dy_TH)
        with poisoned_empty():
            ours = emergence_kernels.expert_mlp(*inputs, permutation, activation)
            found = torch.autograd.grad(ours, leaves, dy_TH)
        close(ours, theirs)
        for a, b in zip(found, expected, strict=True):
            close(a, b)

    @pytest.mark.parametrize("operators", [emergence_kernels, reference], ids=["fused", "twin"])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_no_tokens(self, operators, activation) -> None:
        permutation = operators.sort_by_expert(torch.zeros(0, 2, dtype=torch.long), 3)
        pre = pre_activation_width(activation, 5)
        leaves = [
            tensor.requires_grad_()
            for tensor in (
                randn(0, 4),
                randn(0, 2),
                randn(3, 4, pre),
                randn(3, pre),
                randn(3, 5, 4),
                randn(3, 4),
            )
        ]
        with poisoned_empty():
            y_TH = operators.expert_mlp(*leaves, permutation, activation)
            assert y_TH.shape == (0, 4)
            for gradient in torch.autograd.grad(y_TH, leaves, randn(0, 4)):
                assert (gradient == 0).all()

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_gradcheck(self, activation) -> None:
        chosen = torch.tensor([[0, 2], [2, 3], [0, 3], [3, 2]])
        permutation = emergence_kernels.sort_by_expert(chosen, 4)  # expert 1 is empty
        pre = pre_activation_width(activation, 3)
        inputs = [
            tensor.requires_grad_()
            for tensor in (
                randn(4, 3, seed=1),
                randn(4, 2, seed=2),
                randn(4, 3, pre, seed=3),
                randn(4, pre, seed=4),
                randn(4, 3, 3, seed=5),
                randn(4, 3, seed=6),
            )
        ]
        assert torch.autograd.gradcheck(
            lambda *tensors: emergence_kernels.expert_mlp(*tensors, permutation, activation), inputs
        )

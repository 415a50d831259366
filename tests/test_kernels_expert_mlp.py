"""Forward and backward of the expert MLP from the Triton kernels, against fp64 and the plain path.

Without a GPU they run in Triton's interpreter, whose bf16 products are wrong: fp32 and fp16 here,
bf16 in `test_gpu_layer.py`. Letters: see `kernel_cases`.
"""

import dataclasses

import pytest
import torch
from conftest import KERNEL_DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_as_accurate, assert_close, poisoned_empty

pytest.importorskip("triton")

from kernel_cases import (
    ACTIVATIONS,
    EDGES,
    INPUTS,
    MIXED_PLAN,
    SMALL_PLAN,
    STRUCTURE,
    Shape,
    all_in_one,
    by_batches,
    by_kernels,
    exactly,
    make_case,
    permutation_of,
    plans,
    rounded,
    shapes,
)

from emergence_kernels.gpu import expert_mlp as kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
LAYOUTS = ("contiguous", "rows apart", "transposed", "strided", "expanded")


@given(
    shapes(True), plans(), st.integers(0, 999), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)
)
@settings(max_examples=12)
def test_every_shape_plan_and_layout_gives_what_the_twin_gives(
    shape, plan, seed, x_layout, dy_layout
) -> None:
    case = make_case(shape, seed=seed, x_layout=x_layout, dy_layout=dy_layout)
    with poisoned_empty(guarded=True):
        found = by_kernels(case, plan)
    assert_close(found, rounded(exactly(case), case), STRUCTURE[torch.float32], least=1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", EDGES.values(), ids=EDGES)
def test_edges(shape, activation) -> None:
    case = make_case(dataclasses.replace(shape, activation=activation))
    with poisoned_empty(guarded=True):
        found = by_kernels(case, MIXED_PLAN)
    assert_close(found, rounded(exactly(case), case), STRUCTURE[torch.float32], least=1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_no_tokens(top_k, activation) -> None:
    case = make_case(Shape(0, 9, 5, 3, top_k, activation=activation))
    with poisoned_empty(guarded=True):
        found = by_kernels(case)
    assert found["y"].shape == found["x"].shape == (0, 9)
    assert found["weights"].shape == (0, top_k)
    for name in ("w1", "b1", "w2", "b2"):
        assert found[name].shape == getattr(case, name).shape
        assert (found[name] == 0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [Shape(20, 24, 24, 3, 2), Shape(24, 40, 9, 2, 1)],
    ids=["top-2", "top-1-uneven-widths"],
)
def test_it_is_as_accurate_as_the_plain_path(shape, dtype, activation) -> None:
    shape = dataclasses.replace(shape, activation=activation)
    draws = []
    for seed in range(2):
        case = make_case(shape, dtype, seed=seed)
        with poisoned_empty(guarded=True):
            ours = by_kernels(case)
        draws.append((ours, by_batches(case), exactly(case)))
    assert_as_accurate(draws, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_default_plan_computes_the_same(dtype) -> None:
    case = make_case(Shape(11, 24, 40, 2, 2), dtype)
    plan = kernels.plan_for(case.x, case.w1, case.permutation, case.activation, "")
    with poisoned_empty(guarded=True):
        found = by_kernels(case, plan)
    assert_close(found, rounded(exactly(case), case), STRUCTURE[dtype], least=1)


def test_a_given_plan_is_the_one_taken() -> None:
    case = make_case(Shape(3, 8, 8, 2, 1))
    arguments = (case.x, case.w1, case.permutation, case.activation)
    assert kernels.plan_for(*arguments, MIXED_PLAN.encoded) == MIXED_PLAN
    assert kernels.plan_for(*arguments, "") != MIXED_PLAN


WANTED = {
    "only-x": ("x",),
    "only-the-routing-weights": ("weights",),
    "only-w1": ("w1",),
    "only-b1": ("b1",),
    "only-w2": ("w2",),
    "only-b2": ("b2",),
    "frozen-experts": ("x", "weights"),
    "frozen-router-and-input": ("w1", "b1", "w2", "b2"),
    "nothing": (),
}


@pytest.mark.parametrize("names", WANTED.values(), ids=WANTED)
def test_what_is_wanted_is_the_same_alone_and_the_rest_is_none(names) -> None:
    case = make_case(Shape(5, 9, 5, 3, 2, activation="swiglu"))
    everything = by_kernels(case)
    with poisoned_empty(guarded=True):
        found = by_kernels(case, wanted=tuple(name in names for name in INPUTS))
    for name in INPUTS:
        if name in names:
            assert torch.equal(found[name], everything[name]), name
        else:
            assert found[name] is None, name


@pytest.mark.parametrize("run", [by_kernels, by_batches], ids=["kernels", "batches"])
def test_gradients_of_weights_kept_in_fp32_are_not_rounded_to_less(run) -> None:
    """Rounded afterwards they are those of fp16 weights, bit for bit; and the rest is the same."""
    case = make_case(Shape(40, 24, 16, 3, 2), torch.float16)
    plain, wide = run(case), run(case, kept=torch.float32)
    for name in ("w1", "b1", "w2", "b2"):
        assert wide[name].dtype == torch.float32, name
        assert torch.equal(wide[name].half(), plain[name]), name
        if run is by_kernels or name in ("b1", "b2"):  # a CPU rounds its products
            assert not torch.equal(wide[name], plain[name].float()), name
    for name in ("y", "x", "weights"):
        assert torch.equal(wide[name], plain[name]), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("run", [by_kernels, by_batches, all_in_one])
def test_an_expert_does_not_see_the_numbers_of_another(run, bad, activation) -> None:
    """Tokens use experts 1 and 2 or 0 and 3, and everything of the latter overflows: the rows
    before and behind, and token 0, which stands in for the rows that a tile does not have."""
    shape = Shape(22, 9, 5, 4, 2, activation=activation)
    chosen = torch.tensor([[0, 3], [1, 2], [2, 1], [3, 0]]).repeat(6, 1)[:22]
    case = make_case(shape)._replace(permutation=permutation_of(chosen, 4))
    clean = run(case)
    spoilt = (chosen[:, 0] % 3 == 0).to(KERNEL_DEVICE)
    for tensor in (case.x, case.dy, case.weights):
        tensor[spoilt] = bad
    for parameter in (case.w1, case.b1, case.w2, case.b2):
        parameter[::3] = bad
    found = run(case)
    for name in ("y", "x", "weights"):
        assert torch.equal(found[name][~spoilt], clean[name][~spoilt]), name
    for name in ("w1", "b1", "w2", "b2"):
        assert torch.equal(found[name][1:3], clean[name][1:3]), name


@pytest.mark.parametrize("run", [by_kernels, by_batches, all_in_one])
def test_experts_without_rows_get_gradients_of_exactly_zero(run) -> None:
    case = make_case(Shape(6, 9, 5, 5, 1, kind="same"))
    with poisoned_empty(guarded=True):
        found = run(case)
    chosen = int((case.permutation.expert_offsets.diff() > 0).nonzero())
    others = [e for e in range(5) if e != chosen]
    for name in ("w1", "b1", "w2", "b2"):
        assert (found[name][others] == 0).all(), name
        assert found[name][chosen].abs().max() > 0, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_tokens_and_their_gradient(layout) -> None:
    case = make_case(Shape(4, 9, 5, 2, 2), x_layout=layout, dy_layout=layout)
    with poisoned_empty(guarded=True):
        found = by_kernels(case)
    assert_close(found, rounded(exactly(case), case), STRUCTURE[torch.float32], least=1)


def test_weights_biases_and_routing_weights_may_have_any_strides() -> None:
    case = make_case(Shape(5, 9, 5, 3, 2))
    expected = by_kernels(case)

    def other_strides(tensor):
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)

    changed = {n: other_strides(getattr(case, n)) for n in ("weights", "w1", "b1", "w2", "b2")}
    assert not any(tensor.is_contiguous() for tensor in changed.values())
    found = by_kernels(case._replace(**changed))
    for name, value in expected.items():
        if name in ("w1", "w2"):  # a product of the other order
            torch.testing.assert_close(found[name], value)
            assert found[name].stride() == changed[name].stride(), name
        else:
            assert torch.equal(found[name], value), name
            assert found[name].is_contiguous(), name


@pytest.mark.parametrize("plan", [SMALL_PLAN, MIXED_PLAN], ids=["one-tile", "tile-per-product"])
def test_two_runs_are_bitwise_equal(plan) -> None:
    case = make_case(Shape(20, 9, 17, 3, 2))
    first, second = by_kernels(case, plan), by_kernels(case, plan)
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@pytest.mark.skipif(KERNEL_DEVICE == "cpu", reason="needs a GPU: enough programs to race")
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_many_rows_give_bitwise_equal_runs(top_k) -> None:
    case = make_case(Shape(2000, 64, 128, 8, top_k))
    plan = kernels.plan_for(case.x, case.w1, case.permutation, case.activation, "")
    first = by_kernels(case, plan)
    for _ in range(8):
        for name, value in by_kernels(case, plan).items():
            assert torch.equal(first[name], value), name

"""The plain path of the expert MLP, however its experts are cut into batches, against fp64.

Letters: see `kernel_cases`.
"""

import dataclasses
from itertools import pairwise

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
    STRUCTURE,
    Shape,
    all_in_one,
    by_batches,
    exactly,
    group_sizes,
    make_case,
    rounded,
    shapes,
)

from emergence_kernels.activations import activate, activate_backward, activate_in_cache
from emergence_kernels.batches import BatchPlan, Layout, cut, default_plan


def batch_plans() -> st.SearchStrategy[BatchPlan]:
    """Of no, some and all experts in one batch."""
    costs = st.sampled_from([0.0, 300.0, 3e3, 3e4, 1e18])
    return st.builds(BatchPlan, costs, st.sampled_from([0, 200, 2**62]))


@given(shapes(True), batch_plans(), st.integers(0, 999))
@settings(max_examples=60)
def test_every_cut_gives_what_the_twin_gives(shape, plan, seed) -> None:
    case = make_case(shape, seed=seed)
    with poisoned_empty(guarded=True):
        found = by_batches(case, plan=plan)
    assert_close(found, rounded(exactly(case), case), STRUCTURE[torch.float32], least=1)


@pytest.mark.parametrize("run", [by_batches, all_in_one])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", EDGES.values(), ids=EDGES)
def test_edges(shape, activation, run) -> None:
    case = make_case(dataclasses.replace(shape, activation=activation))
    with poisoned_empty(guarded=True):
        found = run(case)
    assert_close(found, rounded(exactly(case), case), STRUCTURE[torch.float32], least=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_padding_costs_no_accuracy(dtype) -> None:
    draws = []
    for seed in range(3):
        case = make_case(Shape(24, 24, 24, 5, 2), dtype, seed=seed)
        draws.append((all_in_one(case), by_batches(case), exactly(case)))
    assert_as_accurate(draws, dtype)


@given(shapes(True), st.lists(st.booleans(), min_size=6, max_size=6))
@settings(max_examples=30)
def test_only_what_is_wanted_is_computed(shape, wanted) -> None:
    case = make_case(shape)
    everything = all_in_one(case)
    found = by_batches(case, tuple(wanted), plan=BatchPlan(1e18, 2**62))
    for name, want in zip(("x", "weights", "w1", "b1", "w2", "b2"), wanted, strict=True):
        if want and everything[name] is not None:
            torch.testing.assert_close(found[name], everything[name])
        else:
            assert found[name] is None


@given(group_sizes(9), batch_plans(), st.sampled_from([1.0, 40.0, 1e3]))
def test_batches_hold_every_expert_with_rows_once(sizes, plan, row_flops) -> None:
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    batches = cut(bounds, 4, row_flops, plan)
    held = [e for b in batches for e in range(b.first, b.end)]
    assert held == sorted(set(held))
    assert {e for e, size in enumerate(sizes) if size} <= set(held)
    assert [b.start for b in batches] == [sum(x.rows.stop - x.rows.start for x in batches[:i])
                                          for i in range(len(batches))]  # fmt: skip
    for batch in batches:
        mine = sizes[batch.first : batch.end]
        assert mine[0] > 0
        assert mine[-1] > 0
        assert batch.length == max(mine)
        assert batch.own == slice(bounds[batch.first], bounds[batch.end])
        if len(mine) > 1:
            rows = batch.rows.stop - batch.rows.start
            assert rows * 4 <= plan.elements
            saved = sum(size > 0 for size in mine) - 1
            assert (rows - sum(mine)) * row_flops <= saved * plan.product_cost


@given(shapes(True), batch_plans())
def test_a_layout_brings_every_row_to_its_expert_and_back(shape, plan) -> None:
    case = make_case(shape)
    permutation = case.permutation
    layout = Layout(permutation, 4, 100.0, plan)
    bounds = permutation.expert_offsets.tolist()
    rows_S = torch.arange(len(permutation.perm), device=KERNEL_DEVICE)
    used, rest = rows_S[: bounds[-1]], rows_S[bounds[-1] :]
    assert torch.equal(layout.rows_Q[layout.places_S[used]], used)
    assert (layout.places_S[rest] == layout.num_rows).all()
    assert torch.equal(layout.tokens_Q, permutation.token_idx[layout.rows_Q])
    scale_Q = layout.scales(case.weights, permutation.perm).squeeze(1)
    scale_S = case.weights.flatten()[permutation.perm]
    assert torch.equal(scale_Q[layout.places_S[used]], scale_S[used])
    assert int((scale_Q != 0).sum()) == bounds[-1]
    for batch in layout.batches:
        rows_BR = batch.view(layout.rows_Q[batch.rows]).squeeze(2)
        for e, mine in zip(range(batch.first, batch.end), rows_BR, strict=True):
            if bounds[e] < bounds[e + 1]:
                assert ((mine >= bounds[e]) & (mine < bounds[e + 1])).all()
    assert layout.without_rows == [e for e, (a, b) in enumerate(pairwise(bounds)) if a == b]


def test_few_rows_of_many_experts_are_few_products_on_a_cpu() -> None:
    """What starting a product costs is what decoding in 16 bits consists of."""
    plan = default_plan(torch.bfloat16, torch.device("cpu"))
    bounds = list(range(0, 130, 2))
    assert len(cut(bounds, 256, 2 * 256 * 256, plan)) == 1
    long = [200 * n for n in range(9)]
    uneven = [0, 10, 1000, 1010, 2000]
    assert len(cut(long, 3072, 2 * 768 * 3072, plan)) == 8
    assert len(cut(uneven, 3072, 2 * 768 * 3072, plan)) == 4


def test_a_plan_survives_the_schema() -> None:
    plan = BatchPlan(9e6, 77)
    assert BatchPlan.decode(plan.encoded) == plan
    for wrong in ("x", "[]", "1", '{"elements": 1}', '{"up": {}}'):
        with pytest.raises(ValueError, match="not a plan of batches"):
            BatchPlan.decode(wrong)


def test_gelu_in_the_cache_is_as_exact_as_its_definition() -> None:
    """And has a slope where torch's, 0 times infinity, has none."""
    pre = torch.cat([torch.linspace(-12, 12, 3001), torch.tensor([1e14, -1e14, 1e25, -1e25])])
    leaf = pre[:3001].double().requires_grad_()
    exact = activate(leaf, "gelu_tanh")
    (slope,) = torch.autograd.grad(exact.sum(), leaf)
    act, found = activate_backward(torch.ones_like(pre), pre, "gelu_tanh")
    for ours, right in (
        (activate_in_cache(pre, "gelu_tanh"), exact),
        (act, exact),
        (found, slope),
    ):
        error = (ours[:3001].double() - right) / right.abs().clamp(min=1)
        assert error.abs().max() < 4e-7
    assert found[3001:].tolist() == pytest.approx([1, 0, 1, 0], abs=1e-30)
    assert activate_in_cache(pre, "gelu_tanh")[3001:].tolist() == [pre[3001], 0, pre[3003], 0]

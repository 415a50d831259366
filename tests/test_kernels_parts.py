"""What the kernels share: activations, which tile is whose, plans, and memory layouts."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import KERNEL_DEVICE
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numerics import FP64, assert_as_accurate, poisoned_empty, randn

pytest.importorskip("triton")

import triton
import triton.language as tl
from kernel_cases import MIXED_PLAN, SMALL, group_sizes, offsets_of

from emergence_kernels.gpu.activation_functions import gelu_tanh, silu
from emergence_kernels.gpu.defaults import (
    TARGETS,
    candidates,
    default_plan,
    target_of,
)
from emergence_kernels.gpu.gemm_config import PRODUCTS, GemmConfig, GemmPlan, rows_bucket
from emergence_kernels.gpu.launch import matmul_precision, with_contiguous_rows
from emergence_kernels.gpu.tiles import expert_tiles, grouped_order, locate_tile, tile_bound

BUCKETS = [1 << n for n in range(4, 13)]


@triton.jit
def _activation_kernel(x_ptr, value_ptr, slope_ptr, SILU: tl.constexpr, SIZE: tl.constexpr):
    """Grid: (1,)."""
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    if SILU:
        value, slope = silu(x)
    else:
        value, slope = gelu_tanh(x)
    tl.store(value_ptr + i, value)
    tl.store(slope_ptr + i, slope)


def _by_torch(x, is_silu):
    x = x.clone().requires_grad_()
    functional = torch.nn.functional
    value = functional.silu(x) if is_silu else functional.gelu(x, approximate="tanh")
    return {"value": value.detach(), "slope": torch.autograd.grad(value.sum(), x)[0]}


@pytest.mark.parametrize("is_silu", [False, True], ids=["gelu_tanh", "silu"])
@pytest.mark.parametrize("spread", [1, 3], ids=["order-one", "wide"])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_activations_and_derivatives_are_as_accurate_as_torchs(is_silu, spread) -> None:
    x = (spread * randn(4096)).float()
    x[:6] = torch.tensor([0.0, -0.0, 1e4, -1e4, 60.0, -60.0])
    x = x.to(KERNEL_DEVICE)
    value, slope = torch.empty_like(x), torch.empty_like(x)
    _activation_kernel[(1,)](x, value, slope, SILU=is_silu, SIZE=4096)
    found = {"value": value, "slope": slope}
    draws = [(found, _by_torch(x, is_silu), _by_torch(x.to(FP64), is_silu))]
    # 1e4 is for the value alone: as a scale it would hide everything else
    assert value[2] == 1e4
    assert value[3].abs() < 1e-30  # clamped: not quite zero
    draws = [tuple({k: v[4:] for k, v in results.items()} for results in draws[0])]
    assert_as_accurate(draws, torch.float32)


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
def test_gelu_far_below_zero_is_flat_and_nan_stays_nan() -> None:
    x = torch.tensor([-1e3, -1e6, -1e11, -1e12, -1e38, float("nan")], device=KERNEL_DEVICE)
    x = torch.nn.functional.pad(x, (0, 2))
    value, slope = torch.empty_like(x), torch.empty_like(x)
    _activation_kernel[(1,)](x, value, slope, SILU=False, SIZE=8)
    assert (value[:5].abs() < 1e-30).all()
    assert (slope[:5].abs() < 1e-30).all()
    assert value[5].isnan()
    assert slope[5].isnan()


@triton.jit
def _coverage_kernel(
    offsets_ptr,  # (E+1,) int32
    times_ptr,  # (S,) int32 in and out: how often a row was somebody's
    expert_ptr,  # (S,) int32 out
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Grid: (programs,): every row of every tile is counted where it lies."""
    start_E, end_E, tiles_E = expert_tiles(offsets_ptr, E, E_PAD, BLOCK_M)
    if tl.program_id(0) < tl.max(tiles_E, 0):
        expert, first, end = locate_tile(tl.program_id(0), start_E, end_E, tiles_E, E_PAD, BLOCK_M)
        row = first + tl.arange(0, BLOCK_M)
        tl.atomic_add(times_ptr + row, 1, mask=row < end)
        tl.store(expert_ptr + row, expert.to(tl.int32), mask=row < end)


@given(group_sizes(largest=9), st.sampled_from([4, 16]))
@example([7], 16)  # E = 1
@example([0, 0, 0], 16)  # S = 0
@example([0, 40, 0, 0, 0], 16)  # one expert takes all
@example([1, 1, 1, 1, 1, 1], 4)  # as many tiles as rows; E is not a power of two
@settings(max_examples=20)
def test_tiles_cover_every_row_once_within_the_bound(sizes, block_m) -> None:
    rows, offsets = sum(sizes), offsets_of(sizes)
    bound = tile_bound(rows, len(sizes), block_m)
    assert sum(-(-size // block_m) for size in sizes) <= bound
    assert bound < -(-rows // block_m) + max(min(len(sizes), rows), 1)
    times = torch.zeros(rows, dtype=torch.int32, device=KERNEL_DEVICE)
    expert = torch.full_like(times, -1)
    if bound:
        E_PAD = triton.next_power_of_2(len(sizes))
        _coverage_kernel[(bound,)](
            offsets, times, expert, E=len(sizes), E_PAD=E_PAD, BLOCK_M=block_m
        )
    assert times.tolist() == [1] * rows
    assert expert.tolist() == [e for e, size in enumerate(sizes) for _ in range(size)]


@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=70),
    st.sampled_from([16, 32, 64, 128, 256]),
)
@settings(max_examples=200)
def test_tile_bound_holds_for_every_routing(sizes, block_m) -> None:
    needed = sum(-(-size // block_m) for size in sizes)
    assert needed <= tile_bound(sum(sizes), len(sizes), block_m)


@triton.jit
def _order_kernel(
    order_ptr,  # (M*N, 2) int32 out: the pair that is computed at every place
    M: tl.constexpr,
    N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (M*N,)."""
    place = tl.program_id(0)
    tile_m, tile_n = grouped_order(place, M, N, GROUP_M)
    tl.store(order_ptr + 2 * place, tile_m)
    tl.store(order_ptr + 2 * place + 1, tile_n)


@pytest.mark.parametrize(
    ("tiles_m", "tiles_n", "group_m"),
    [(1, 1, 8), (5, 3, 2), (4, 3, 4), (7, 2, 8), (5, 1, 3), (3, 4, 1)],
    ids=["single", "last-group-short", "one-group", "group-too-large", "one-column", "no-groups"],
)
def test_the_grouped_order_visits_every_pair_once_and_groups_rows(
    tiles_m, tiles_n, group_m
) -> None:
    order = torch.full((tiles_m * tiles_n, 2), -1, dtype=torch.int32, device=KERNEL_DEVICE)
    _order_kernel[(tiles_m * tiles_n,)](order, M=tiles_m, N=tiles_n, GROUP_M=group_m)
    pairs = [tuple(pair) for pair in order.tolist()]
    assert sorted(pairs) == [(m, n) for m in range(tiles_m) for n in range(tiles_n)]
    # row tiles of one group are all done before the next group begins
    groups = [m // group_m for m, _ in pairs]
    assert groups == sorted(groups)
    # within a group the columns advance last, so that its rows share them
    columns = [n for m, n in pairs if m < group_m]
    assert columns == sorted(columns)


@given(st.integers(0, 10**7), st.integers(1, 512))
def test_the_bucket_is_a_power_of_two_around_the_mean_rows(rows, experts) -> None:
    bucket = rows_bucket(rows, experts)
    assert bucket in BUCKETS
    mean = rows / experts
    assert bucket >= min(mean, 4096)
    assert bucket == 16 or bucket < 2 * max(mean, 1)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
        (torch.bfloat16, "ieee"),
        (torch.float16, "ieee"),
    ],
    ids=["fp32", "tf32", "bf16", "fp16"],
)
def test_every_bucket_has_a_default_plan_that_a_kernel_can_take(target, dtype, precision) -> None:
    for bucket in BUCKETS:
        for gated in (False, True):
            plan = default_plan(target, dtype, precision, bucket, gated=gated)
            for product in PRODUCTS:
                config = getattr(plan, product)
                for side in (config.block_m, config.block_n, config.block_k):
                    # what tl.dot takes, and a power of two
                    assert side >= 16
                    assert side & (side - 1) == 0
                factors = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
                assert factors * max(config.stages - 1, 1) <= target.shared_bytes
                assert config.warps in (4, 8)
                found = candidates(product, target, dtype, bucket, precision=precision, gated=gated)
                # IEEE fp32 runs without matrix units: there is nothing to choose
                assert bool(found) == (dtype != torch.float32 or precision == "tf32")
                assert len(set(found)) == len(found)


def test_the_plan_of_this_device_exists() -> None:
    target = target_of(torch.device(KERNEL_DEVICE))
    assert target.shared_bytes > 40_000
    assert default_plan(target, torch.float32, "ieee", 128, gated=False)


def test_a_plan_survives_its_text() -> None:
    assert GemmPlan.decode(MIXED_PLAN.encoded) == MIXED_PLAN
    changed = replace(MIXED_PLAN, down=replace(SMALL, group_m=5))
    assert GemmPlan.decode(changed.encoded) == changed != MIXED_PLAN


def _without(product: str) -> str:
    return json.dumps({k: v for k, v in json.loads(MIXED_PLAN.encoded).items() if k != product})


@pytest.mark.parametrize(
    "text",
    [
        "fast",
        "[]",
        "{}",
        _without("weight_grad"),
        MIXED_PLAN.encoded.replace("group_m", "groups"),
        MIXED_PLAN.encoded.replace('"down"', '"downwards"'),
        '{"up": 16}',
    ],
    ids=["no-json", "a-list", "nothing", "four-products", "unknown-key", "unknown-product", "flat"],
)
def test_other_texts_are_no_plan(text) -> None:
    with pytest.raises(ValueError, match="not a plan"):
        GemmPlan.decode(text)


@pytest.mark.parametrize("persistent", [False, True], ids=["program-per-tile", "persistent"])
@pytest.mark.parametrize("tiles", [0, 1, 2, 1000])
def test_there_are_programs_for_every_tile_and_none_idle(tiles, persistent) -> None:
    config = GemmConfig(16, 16, 16, 4, 2, persistent=persistent)
    programs = config.programs(tiles, torch.device(KERNEL_DEVICE))
    assert (0 < programs <= tiles) or programs == tiles == 0
    if not persistent:
        assert programs == tiles
    elif tiles == 1000:
        assert programs < tiles


def test_the_precision_of_fp32_products_follows_torch() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert matmul_precision(torch.zeros(1)) == expected
            assert matmul_precision(torch.zeros(1, dtype=torch.float16)) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("tensor", "copied"),
    [
        (torch.zeros(4, 6), False),
        (torch.zeros(4, 6)[:, :3], False),
        (torch.zeros(1, 6).expand(4, 6), False),
        (torch.zeros(4, 6)[:, ::2], True),
        (torch.zeros(6, 4).t(), True),
        (torch.zeros(4, 6)[:, :1].t().contiguous().t(), False),
    ],
    ids=["contiguous", "rows-apart", "one-row", "columns-apart", "transposed", "one-column"],
)
def test_only_rows_that_are_not_contiguous_are_copied(tensor, copied) -> None:
    with poisoned_empty():
        found = with_contiguous_rows(tensor)
    assert torch.equal(found, tensor)
    assert found.stride(1) == 1 or tensor.shape[1] == 1
    assert (found is tensor) == (not copied)

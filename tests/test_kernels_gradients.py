"""The launchers of the expert MLP's backward pass that are no plain products, against fp64.

Letters: T tokens, H model width, F expert width, P pre-activation width (F, or 2F for SwiGLU),
E experts, K experts per token, S = T*K rows sorted by expert, M row tiles, N column tiles.
"""

import dataclasses

import pytest
import torch
from conftest import KERNEL_DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import FP64, assert_close, poisoned_empty, randn

pytest.importorskip("triton")

from kernel_cases import (
    ACTIVATIONS,
    STRUCTURE,
    Shape,
    group_sizes,
    make_case,
    offsets_of,
    shapes,
    surrounded,
)

from emergence_kernels.activations import activate, activate_backward
from emergence_kernels.gpu.activation_gradient import ROWS_PER_TILE, activation_gradient
from emergence_kernels.gpu.small_gradients import output_bias_gradient, sums
from emergence_kernels.gpu.tiles import tile_bound
from emergence_kernels.grouped_gemm import grouped_sum, rows_of_experts
from emergence_kernels.permutation import Permutation

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


def check(found, exact) -> None:
    """One result against its fp64 value."""
    assert_close({"result": found}, {"result": exact.to(found)}, STRUCTURE[found.dtype], least=1)


def factors(shape, dtype=torch.float32):
    """dA' (S, F) and pre-activations (S, P)."""
    rows = shape.tokens * shape.top_k
    dact = surrounded(randn(rows, shape.width, seed=78, dtype=dtype))
    return dact, surrounded(randn(rows, shape.pre_width, seed=77, dtype=dtype))


PARTS = ("pre", "bias", "act", "scale")
RESULTS = ("dpre_SP", "db1_MP", "scaled_act_SF", "dscale_NS")


def compute(case, dact, pre, parts=PARTS):
    """`activation_gradient` of a copy of dA', with the parts by the name of their flag."""
    with poisoned_empty(guarded=True):
        found = activation_gradient(
            surrounded(dact),
            pre,
            case.weights,
            case.permutation,
            case.activation,
            **{f"want_{part}": part in parts for part in PARTS},
        )
    return {part: getattr(found, name) for part, name in zip(PARTS, RESULTS, strict=True)}


class TestActivationGradient:
    def run_and_check(self, shape, dtype=torch.float32):
        case, (dact, pre) = make_case(shape, dtype), factors(shape, dtype)
        found = compute(case, dact, pre)
        permutation, dact = case.permutation, dact.to(FP64)
        offsets = permutation.expert_offsets
        scale = case.weights.to(FP64).reshape(-1)[permutation.perm].unsqueeze(1)
        act = activate(pre.to(FP64), case.activation)
        dpre = activate_backward(dact * scale, pre.to(FP64), case.activation)[1]
        check(found["pre"], dpre)
        check(found["act"], act * scale)
        check(found["scale"].sum(0), (dact * act).sum(1))
        db1 = sum_of_tiles(found["bias"], offsets)
        check(db1, grouped_sum(dpre, offsets))
        return found

    @given(shapes())
    @settings(max_examples=12)
    def test_any_shape(self, shape) -> None:
        self.run_and_check(shape)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_several_tiles_of_rows(self, activation) -> None:
        shape = Shape(2 * ROWS_PER_TILE + 5, 1, 24, 3, 2, "few", activation)
        assert make_case(shape).permutation.expert_offsets.diff().max() > ROWS_PER_TILE
        self.run_and_check(shape)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_several_tiles_of_columns(self, activation) -> None:
        found = self.run_and_check(Shape(5, 1, 300, 3, 2, activation=activation))
        assert len(found["scale"]) > 1

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_fp16(self, activation) -> None:
        self.run_and_check(Shape(5, 9, 24, 3, 2, activation=activation), torch.float16)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize(
        "parts",
        [("pre",), ("act",), ("scale",), ("pre", "bias"), ("act", "scale"), ()],
        ids=lambda parts: "-".join(parts) or "nothing",
    )
    def test_parts_are_the_same_alone_and_the_rest_is_none(self, parts, activation) -> None:
        shape = Shape(5, 9, 5, 3, 2, activation=activation)
        case, (dact, pre) = make_case(shape), factors(shape)
        everything, found = compute(case, dact, pre), compute(case, dact, pre, parts)
        for part in PARTS:
            assert (found[part] is not None) == (part in parts), part
        # `bias` has unwritten rows where fewer tiles were needed than the bound
        for part in set(parts) - {"bias"}:
            # a compiler may contract other sums and products where others are left out
            tolerance = 0.0 if KERNEL_DEVICE == "cpu" else 1e-6
            torch.testing.assert_close(
                found[part], everything[part], rtol=tolerance, atol=tolerance, msg=part
            )
        if "bias" in parts:
            offsets = case.permutation.expert_offsets
            sums = [sum_of_tiles(r["bias"], offsets) for r in (found, everything)]
            assert torch.equal(*sums)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_only_without_a_gate_the_gradient_takes_the_memory_of_the_factor(
        self, activation
    ) -> None:
        shape = Shape(20, 1, 70, 3, 2, activation=activation)
        case, (dact, pre) = make_case(shape), factors(shape)
        # guarded by hand: `poisoned_empty` knows new memory only
        around = dact.new_full((len(dact) + 2, shape.width), float("nan"))
        given = around[1:-1].copy_(dact)
        found = activation_gradient(
            given, pre, case.weights, case.permutation, activation,
            want_pre=True, want_bias=True, want_act=True, want_scale=True,
        )  # fmt: skip
        in_place = found.dpre_SP.data_ptr() == given.data_ptr()
        assert in_place == (activation == "gelu_tanh")
        assert torch.equal(given, found.dpre_SP if in_place else dact)
        assert around[[0, -1]].isnan().all()

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    def test_an_expert_does_not_see_the_rows_of_another(self, bad, activation) -> None:
        shape = Shape(20, 1, 9, 3, 2, activation=activation)
        case, (dact, pre) = make_case(shape), factors(shape)
        offsets = case.permutation.expert_offsets
        first, end = offsets[1:3].tolist()
        assert 0 < first < end < len(dact)
        clean = compute(case, dact, pre)
        for rows in (dact[:first], dact[end:], pre[:first], pre[end:]):
            rows[:] = bad
        found = compute(case, dact, pre)
        for part in ("pre", "act"):
            assert torch.equal(found[part][first:end], clean[part][first:end]), part
        assert torch.equal(found["scale"][:, first:end], clean["scale"][:, first:end])
        sums = [sum_of_tiles(r["bias"], offsets)[1] for r in (found, clean)]
        assert torch.equal(*sums)


class TestOutputBiasGradient:
    def run_and_check(self, shape) -> None:
        case = make_case(shape)
        permutation = case.permutation
        dy = surrounded(case.dy[permutation.token_idx])
        with poisoned_empty(guarded=True):
            db2, dscale = output_bias_gradient(dy, case.weights, case.b2, permutation)
            db2 = sum_of_tiles(db2, permutation.expert_offsets)
        dy = dy.to(FP64)
        scale = case.weights.to(FP64).reshape(-1)[permutation.perm].unsqueeze(1)
        check(db2, grouped_sum(dy * scale, permutation.expert_offsets))
        bias = rows_of_experts(case.b2.to(FP64), permutation.expert_offsets, len(dy))
        check(dscale.sum(0), (dy * bias).sum(1))

    @given(shapes())
    @settings(max_examples=10)
    def test_any_shape(self, shape) -> None:
        self.run_and_check(dataclasses.replace(shape, biases=(True, True)))

    @pytest.mark.parametrize(
        "shape",
        [Shape(70, 70, 1, 3, 1, "same"), Shape(50, 9, 1, 3, 1, "few"), Shape(9, 130, 1, 2, 1)],
        ids=["two-tiles-of-one-expert", "an-empty-expert", "three-blocks-of-H"],
    )
    def test_several_tiles(self, shape) -> None:
        self.run_and_check(shape)

    def test_tiles_are_summed_in_fp32(self) -> None:
        """2,048 and 63 times one, in a tile each: fp16 alone stays at 2,048."""
        case = make_case(Shape(4096, 3, 1, 2, 1, "same"), torch.float16)
        dy = torch.zeros(4096, 3, dtype=torch.float16, device=KERNEL_DEVICE)
        dy[::64] = 1
        dy[0] = 2048
        shares, _ = output_bias_gradient(
            dy, torch.ones_like(case.weights), case.b2, case.permutation
        )
        db2 = sum_of_tiles(shares, case.permutation.expert_offsets, torch.float16)
        expected = torch.zeros_like(db2)
        expected[int(case.permutation.expert_offsets[1] == 0)] = 2048 + 63
        assert torch.equal(db2, expected)


def sum_of_tiles(
    tiles: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The part of `sums` that adds shares of row tiles, as b1 and as b2: the same."""
    permutation = Permutation(offsets[:0], offsets[:0], offsets[:0], offsets)
    weights = torch.empty(0, 1, device=tiles.device)
    first, second, no_weights = sums(tiles, tiles, None, None, permutation, weights, dtype)
    assert first is not None
    assert no_weights is None
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    return first


def routing_weight_gradient(
    shares: torch.Tensor, of_bias: torch.Tensor | None, permutation: Permutation, weights
) -> torch.Tensor:
    """The part of `sums` that adds shares of column tiles."""
    found = sums(None, None, shares, of_bias, permutation, weights, torch.float32)
    assert found[:2] == (None, None)
    return found[2]


class TestSums:
    @given(shapes(), st.integers(0, 3), st.booleans(), st.booleans())
    @settings(max_examples=15)
    def test_all_at_once_are_each_alone(self, shape, bias_tiles, has_b1, has_b2) -> None:
        """Blocks of one part do not reach into another's."""
        case = make_case(shape)
        permutation, rows = case.permutation, case.permutation.perm.numel()
        tiles = tile_bound(rows, shape.experts, ROWS_PER_TILE)
        b1 = surrounded(randn(tiles, 131, dtype=torch.float32)) if has_b1 else None
        b2 = surrounded(randn(tiles, 9, seed=1, dtype=torch.float32)) if has_b2 else None
        shares = surrounded(randn(2, rows, seed=2, dtype=torch.float32))
        of_bias = surrounded(randn(bias_tiles, rows, seed=3, dtype=torch.float32))
        of_bias = of_bias if bias_tiles else None
        with poisoned_empty(guarded=True):
            found = sums(b1, b2, shares, of_bias, permutation, case.weights, torch.float32)
        for part, tiles_of_part in zip(found[:2], (b1, b2), strict=True):
            if tiles_of_part is None:
                assert part is None
            else:
                assert torch.equal(part, sum_of_tiles(tiles_of_part, permutation.expert_offsets))
        alone = routing_weight_gradient(shares, of_bias, permutation, case.weights)
        assert torch.equal(found[2], alone)

    def test_nothing(self) -> None:
        case = make_case(Shape(4, 1, 1, 3, 2))
        found = sums(None, None, None, None, case.permutation, case.weights, torch.float32)
        assert found == (None, None, None)


class TestSumOfTiles:
    @given(group_sizes(), st.sampled_from([1, 5, 130]))
    @settings(max_examples=15)
    def test_tiles_of_any_groups(self, sizes, width) -> None:
        """Tiles beyond the needed ones are unwritten memory."""
        sizes = [5 * size for size in sizes]
        counts = [-(-size // ROWS_PER_TILE) for size in sizes]
        values = randn(sum(counts) + 2, width, dtype=torch.float32)
        values[sum(counts) :] = float("nan")
        tiles = surrounded(values)
        with poisoned_empty(guarded=True):
            found = sum_of_tiles(tiles, offsets_of(sizes))
        parts = tiles[: sum(counts)].to(FP64).split(counts)
        check(found, torch.stack([part.sum(0) for part in parts]))
        for e, count in enumerate(counts):
            assert count or (found[e] == 0).all()

    def test_more_tiles_than_are_added_at_once(self) -> None:
        tiles = surrounded(randn(40, 9, dtype=torch.float32))
        found = sum_of_tiles(tiles, offsets_of([37 * ROWS_PER_TILE - 1, 0, 3 * ROWS_PER_TILE]))
        parts = tiles.to(FP64).split([37, 0, 3])
        check(found, torch.stack([part.sum(0) for part in parts]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_the_sum_is_rounded_once(self, dtype) -> None:
        tiles = torch.full((33, 2), 2.0**-12, device=KERNEL_DEVICE)
        tiles[0] = 1
        found = sum_of_tiles(tiles, offsets_of([33 * ROWS_PER_TILE]), dtype)
        assert found.dtype == dtype
        assert (found == 1 + 2.0**-7).all()


class TestRoutingWeightGradient:
    @given(st.integers(0, 300), st.integers(1, 3), st.sampled_from([1, 4, 32, 65]), st.booleans())
    @settings(max_examples=15)
    def test_shares_of_tiles_and_of_the_bias_are_added(self, tokens, top_k, tiles, bias) -> None:
        case = make_case(Shape(tokens, 1, 1, 3, top_k))
        rows = tokens * top_k
        shares = surrounded(randn(tiles, rows, dtype=torch.float32))
        of_bias = surrounded(randn(2, rows, seed=1, dtype=torch.float32)) if bias else None
        inv_perm = case.permutation.inv_perm
        with poisoned_empty(guarded=True):
            found = routing_weight_gradient(shares, of_bias, case.permutation, case.weights)
        total = shares.to(FP64).sum(0) + (0 if of_bias is None else of_bias.to(FP64).sum(0))
        check(found, total[inv_perm].view(tokens, top_k))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_the_dtype_is_that_of_the_weights(self, dtype) -> None:
        case = make_case(Shape(4, 1, 1, 3, 2))
        shares = surrounded(randn(1, 8, dtype=torch.float32))
        weights = case.weights.to(dtype).t().contiguous().t()
        found = routing_weight_gradient(shares, None, case.permutation, weights)
        assert found.dtype == dtype
        assert found.is_contiguous()

"""Every launcher of the expert MLP's products against plain torch in fp64.

Letters: T tokens, H model width, F expert width, P pre-activation width (F, or 2F for SwiGLU),
E experts, K experts per token, S = T*K rows sorted by expert, I and O a weight's two widths.
"""

from dataclasses import replace

import pytest
import torch
from conftest import KERNEL_DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import FP64, assert_as_accurate, assert_close, poisoned_empty, randn

pytest.importorskip("triton")

from kernel_cases import (
    ACTIVATIONS,
    MIXED_PLAN,
    SMALL,
    STRUCTURE,
    Case,
    Shape,
    configs,
    group_sizes,
    make_case,
    offsets_of,
    shapes,
    surrounded,
)

from emergence_kernels import grouped_gemm, grouped_gemm_dw, reference
from emergence_kernels.activations import activate
from emergence_kernels.gpu.combine import combine, gather
from emergence_kernels.gpu.descriptors import can_describe
from emergence_kernels.gpu.gemm_config import GemmConfig
from emergence_kernels.gpu.row_product import row_product
from emergence_kernels.gpu.up_projection import up_projection
from emergence_kernels.gpu.weight_gradient import weight_gradient

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
FP32 = torch.float32
WIDTHS = st.sampled_from([1, 5, 9, 16, 24])
DESCRIBED = replace(SMALL, tma=True)
HAS_DESCRIPTORS = KERNEL_DEVICE == "cpu" or torch.cuda.get_device_capability()[0] >= 9
CONFIGS = {
    "small": SMALL,
    "wide-tiles-in-no-groups": MIXED_PLAN.up,
    "persistent-tall-tiles": MIXED_PLAN.down,
    "persistent-groups-of-3": MIXED_PLAN.activation_grad,
    "descriptors": DESCRIBED,
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
loads = pytest.mark.parametrize("config", [SMALL, DESCRIBED], ids=["plain", "descriptors"])


def any_configs() -> st.SearchStrategy[GemmConfig]:
    """Those that load through descriptors too, where the rows are aligned."""
    return st.builds(lambda config, tma: replace(config, tma=tma), configs(), st.booleans())


def check(found, exact) -> None:
    """One result against its fp64 value."""
    assert_close({"result": found}, {"result": exact.to(found)}, STRUCTURE[found.dtype], least=1)


def sorted_rows(case: Case) -> torch.Tensor:
    """(S, H): the token of every sorted row, as the products take them."""
    return surrounded(case.x[case.permutation.token_idx])


def one_per_block(dtype: torch.dtype) -> torch.Tensor:
    """(1, 512): 2,048, then a one in each of the other 31 blocks of 16."""
    row = torch.zeros(1, 512, dtype=dtype, device=KERNEL_DEVICE)
    row[:, ::16] = 1
    row[:, 0] = 2048
    return row


class TestGather:
    def run_and_check(self, shape, dtype, layout) -> None:
        case = make_case(shape, dtype, x_layout=layout)
        with poisoned_empty(guarded=True):
            rows = gather(case.x, case.permutation.token_idx)
        assert rows.dtype == dtype
        assert rows.is_contiguous()
        assert torch.equal(rows, case.x[case.permutation.token_idx])

    @given(
        st.integers(0, 70),
        st.sampled_from([1, 5, 16, 24, 1100]),
        st.integers(1, 4),
        st.sampled_from([torch.float32, torch.float16]),
        st.sampled_from(["contiguous", "rows apart", "expanded"]),
    )
    @settings(max_examples=12)
    def test_any_rows(self, tokens, hidden, top_k, dtype, layout) -> None:
        self.run_and_check(Shape(tokens, hidden, 1, 4, top_k), dtype, layout)

    @pytest.mark.parametrize("layout", ["contiguous", "rows apart", "expanded"])
    @pytest.mark.parametrize(
        "shape",
        [Shape(1, 9, 1, 1, 1), Shape(150, 24, 1, 4, 2), Shape(3, 1100, 1, 4, 3)],
        ids=["one-row", "blocks-of-rows", "blocks-of-columns"],
    )
    def test_blocks_and_layouts(self, shape, layout) -> None:
        self.run_and_check(shape, FP32, layout)


class TestUpProjection:
    def run_and_check(self, case, config) -> None:
        x, offsets = sorted_rows(case), case.permutation.expert_offsets
        with poisoned_empty(guarded=True):
            pre, act = up_projection(x, case.w1, case.b1, offsets, case.activation, config, "ieee")
        bias = None if case.b1 is None else case.b1.to(FP64)
        exact = reference.grouped_gemm(x.to(FP64), case.w1.to(FP64), offsets, bias)
        check(pre, exact)
        check(act, activate(exact, case.activation))

    @given(shapes(), any_configs())
    @settings(max_examples=10)
    def test_any_shape(self, shape, config) -> None:
        self.run_and_check(make_case(shape), config)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @every_config
    def test_tails_of_rows_columns_and_the_reduction(self, config, activation) -> None:
        shape = Shape(11, 24, 40, 3, 2, activation=activation)
        self.run_and_check(make_case(shape), config)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @every_config
    def test_weights_stored_the_other_way(self, config, activation) -> None:
        """Read as they are in tf32, which rounds on a GPU alone; IEEE fp32 transposes them."""
        case = make_case(Shape(11, 24, 40, 3, 2, activation=activation))
        x, offsets = sorted_rows(case), case.permutation.expert_offsets
        stored = surrounded(case.w1.mT.contiguous())
        for precision in ("ieee",) if x.is_cuda else ("ieee", "tf32"):
            with poisoned_empty(guarded=True):
                found = up_projection(
                    x, stored, case.b1, offsets, activation, config, precision, transposed=True
                )
                plain = up_projection(x, case.w1, case.b1, offsets, activation, config, precision)
            for ours, expected in zip(found, plain, strict=True):
                check(ours, expected.to(FP64))

    @loads
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_the_activation_is_of_the_accumulator_not_of_its_rounded_value(
        self, activation, config
    ) -> None:
        """So it is rounded once: half an ulp from the exact activation, however flat that is."""
        case = make_case(Shape(20, 8, 16, 2, 1, activation=activation), torch.float16)
        x, offsets = sorted_rows(case), case.permutation.expert_offsets
        _, act = up_projection(x, case.w1, case.b1, offsets, activation, config, "ieee")
        pre = reference.grouped_gemm(x.to(FP64), case.w1.to(FP64), offsets, case.b1.to(FP64))
        exact = activate(pre, activation)
        rounding = torch.finfo(torch.float16).eps / 2 * exact.abs()
        of_fp32 = 20 * torch.finfo(FP32).eps * pre.abs().max() ** 2
        assert ((act.to(FP64) - exact).abs() <= rounding + of_fp32).all()


class TestRowProduct:
    def run_and_check(self, sizes, inner, outer, config, transposed, bias) -> None:
        x = surrounded(randn(sum(sizes), inner, dtype=FP32))
        w = surrounded(randn(len(sizes), inner, outer, seed=1, dtype=FP32))
        b = surrounded(randn(len(sizes), outer, seed=2, dtype=FP32)) if bias else None
        stored = surrounded(w.transpose(1, 2).contiguous()) if transposed else w
        offsets = offsets_of(sizes)
        exact = reference.grouped_gemm(
            x.to(FP64), w.to(FP64), offsets, None if b is None else b.to(FP64)
        )
        # IEEE fp32 transposes a weight before; tf32 reads it as it is, and rounds on a GPU alone
        both = transposed and not x.is_cuda
        for precision in ("ieee", "tf32") if both else ("ieee",):
            with poisoned_empty(guarded=True):
                y = row_product(x, stored, b, offsets, config, precision, transposed=transposed)
            check(y, exact)

    @pytest.mark.parametrize("block_k", [128, 256])
    def test_steps_as_long_as_a_chain_and_longer(self, block_k) -> None:
        config = GemmConfig(16, 16, block_k, warps=4, stages=1)
        self.run_and_check([5, 9], 520, 16, config, False, True)

    @given(group_sizes(), WIDTHS, WIDTHS, any_configs(), st.booleans(), st.booleans())
    @settings(max_examples=12)
    def test_any_groups(self, sizes, inner, outer, config, transposed, bias) -> None:
        self.run_and_check(sizes, inner, outer, config, transposed, bias)

    @pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
    @pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
    @every_config
    def test_tails_of_rows_columns_and_the_reduction(self, config, bias, transposed) -> None:
        self.run_and_check([3, 0, 19], 24, 40, config, transposed, bias)

    @pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
    @pytest.mark.parametrize("inner", [256, 300], ids=["whole-chains", "a-short-last-chain"])
    def test_a_reduction_of_several_chains(self, inner, transposed) -> None:
        self.run_and_check([3, 0, 19], inner, 9, SMALL, transposed, bias=True)

    @loads
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_reductions_are_accumulated_in_fp32(self, dtype, config) -> None:
        """2,048 and 31 times one, in a block of the reduction each: fp16 alone stays at 2,048."""
        x = one_per_block(dtype).expand(2, 512).contiguous()
        w = torch.ones(1, 512, 8, dtype=dtype, device=KERNEL_DEVICE)
        y = row_product(x, w, None, offsets_of([2]), config, "ieee")
        assert y.dtype == dtype
        assert torch.equal(y, torch.full_like(y, 2079))

    def test_fp16_is_as_accurate_as_the_plain_path(self) -> None:
        draws = []
        for seed in range(2):
            x = surrounded(randn(20, 40, seed=seed, dtype=torch.float16))
            w = surrounded(randn(2, 40, 24, seed=seed + 5, dtype=torch.float16))
            b = surrounded(randn(2, 24, seed=seed + 9, dtype=torch.float16))
            offsets = offsets_of([7, 13])
            ours = row_product(x, w, b, offsets, SMALL, "ieee")
            exact = reference.grouped_gemm(x.to(FP64), w.to(FP64), offsets, b.to(FP64))
            paths = (ours, grouped_gemm(x, w, offsets, b), exact)
            draws.append(tuple({"y": result} for result in paths))
        assert_as_accurate(draws, torch.float16)


class TestCombine:
    @given(
        st.integers(0, 20), st.sampled_from([1, 5, 16, 24, 1100]), st.integers(1, 4), st.booleans()
    )
    @settings(max_examples=10)
    def test_any_rows(self, tokens, hidden, top_k, weighted) -> None:
        case = make_case(Shape(tokens, 1, 1, 4, top_k))
        rows = surrounded(randn(tokens * top_k, hidden, dtype=FP32))
        weights = case.weights if weighted else None
        with poisoned_empty(guarded=True):
            y = combine(rows, case.permutation.inv_perm, top_k, weights)
        exact = rows.to(FP64)[case.permutation.inv_perm].view(tokens, top_k, hidden)
        scale = case.weights.to(FP64).unsqueeze(-1) if weighted else 1
        check(y, (scale * exact).sum(1))

    def test_sums_are_rounded_once(self) -> None:
        """1 + 8 * 2**-12 in fp16, whose numbers beyond 1 are 2**-10 apart: each part alone is
        lost."""
        case = make_case(Shape(3, 1, 1, 9, 9))
        parts = torch.full((9,), 2.0**-12, dtype=torch.float16)
        parts[0] = 1
        rows = torch.empty(27, 5, dtype=torch.float16, device=KERNEL_DEVICE)
        rows[case.permutation.inv_perm] = parts.repeat(3)[:, None].expand(27, 5).to(rows)
        y = combine(rows, case.permutation.inv_perm, 9, None)
        assert (y == 1 + 2.0**-9).all()
        halved = combine(rows, case.permutation.inv_perm, 9, torch.full_like(case.weights, 0.5))
        assert (halved == 0.5 + 2.0**-10).all()


class TestWeightGradient:
    def run_and_check(self, sizes, inner, outer, config) -> None:
        a = surrounded(randn(sum(sizes), inner, dtype=FP32))
        b = surrounded(randn(sum(sizes), outer, seed=1, dtype=FP32))
        offsets = offsets_of(sizes)
        with poisoned_empty(guarded=True):
            dw = weight_gradient(a, b, offsets, config, "ieee", a.dtype)
        check(dw, grouped_gemm_dw(a.to(FP64), b.to(FP64), offsets))
        for e, size in enumerate(sizes):
            assert size or (dw[e] == 0).all()

    @given(group_sizes(), WIDTHS, WIDTHS, any_configs())
    @settings(max_examples=12)
    def test_any_groups(self, sizes, inner, outer, config) -> None:
        self.run_and_check(sizes, inner, outer, config)

    @loads
    @pytest.mark.parametrize("outer", [9, 24], ids=["rows-not-aligned", "rows-aligned"])
    def test_tails_of_rows_and_both_widths(self, outer, config) -> None:
        self.run_and_check([3, 0, 19], 24, outer, config)

    @every_config
    def test_other_tiles(self, config) -> None:
        self.run_and_check([0, 17, 0, 2], 40, 24, config)

    @loads
    @pytest.mark.parametrize(
        "sizes",
        [[16], [15, 17], [0, 32, 0, 16, 0], [5, 48, 0, 27], [1, 0, 0]],
        ids=["one-block", "around-a-block", "blocks-only", "blocks-out-of-step", "one-row"],
    )
    def test_lengths_of_whole_blocks_and_others(self, sizes, config) -> None:
        self.run_and_check(sizes, 16, 24, config)

    def test_rows_of_several_chains(self) -> None:
        self.run_and_check([131, 0, 256], 9, 5, SMALL)

    @loads
    def test_no_rows_at_all(self, config) -> None:
        self.run_and_check([0, 0, 0], 16, 8, config)

    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    @loads
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
    def test_an_expert_does_not_see_the_rows_of_another(self, bad, config) -> None:
        """Neither those before nor those behind, whatever its own end leaves of a block."""
        sizes = [16, 0, 3, 32, 0, 19, 1]
        a, b = randn(sum(sizes), 16, dtype=FP32), randn(sum(sizes), 24, seed=1, dtype=FP32)
        offsets = offsets_of(sizes)
        clean = weight_gradient(surrounded(a), surrounded(b), offsets, config, "ieee", a.dtype)
        for e in range(len(sizes)):
            others = torch.ones(len(a), 1, dtype=torch.bool)
            others[offsets[e] : offsets[e + 1]] = False
            factors = [surrounded(rows.masked_fill(others, bad)) for rows in (a, b)]
            assert can_describe(config, *factors) == (config.tma and HAS_DESCRIPTORS)
            assert torch.equal(
                weight_gradient(*factors, offsets, config, "ieee", a.dtype)[e], clean[e]
            )

    @loads
    @pytest.mark.parametrize("kept", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_rows_are_summed_in_fp32(self, dtype, kept, config) -> None:
        """2,048 and 31 times one, in a block of the reduction each: fp16 alone stays at 2,048."""
        a = one_per_block(dtype).t().expand(512, 8).contiguous()
        dw = weight_gradient(a, torch.ones_like(a), offsets_of([0, 512]), config, "ieee", kept)
        assert dw.dtype == kept
        assert (dw[0] == 0).all()
        assert torch.equal(dw[1], torch.full_like(dw[1], 2079))

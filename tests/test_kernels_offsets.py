"""Elements beyond the 2**31st: offsets that 32 bits would wrap.

The memory is allocated but hardly touched: rows far apart, or the last rows or the last expert of
a large tensor, so that on a CPU it takes address space only. Results that are written throughout
take a GPU. Untested are the shares of the routing weights' gradient: their inputs would have 2**37
elements.

Letters: see `kernel_cases`, and R the rows that nobody has before the first expert's.
"""

from dataclasses import replace

import pytest
import torch
from conftest import KERNEL_DEVICE
from numerics import FP64, assert_close, randn

pytest.importorskip("triton")

from kernel_cases import STRUCTURE

from emergence_kernels.activations import activate, activate_backward
from emergence_kernels.gpu.activation_gradient import (
    _activation_gradient_bwd_kernel,
    activation_gradient,
)
from emergence_kernels.gpu.combine import _combine_fwd_kernel, combine, gather
from emergence_kernels.gpu.gemm_config import GemmConfig
from emergence_kernels.gpu.launch import launch
from emergence_kernels.gpu.row_product import row_product
from emergence_kernels.gpu.small_gradients import (
    _output_bias_bwd_kernel,
    _sums_bwd_kernel,
    output_bias_gradient,
)
from emergence_kernels.gpu.up_projection import up_projection
from emergence_kernels.gpu.weight_gradient import weight_gradient
from emergence_kernels.permutation import Permutation

FP16 = torch.float16
LIMIT = 2**31
# persistent: a program per tile would be a program for each of the rows that nobody has
CONFIG = GemmConfig(16, 16, 16, warps=4, stages=2, persistent=True)
DESCRIBED = replace(CONFIG, tma=True)
AS_IT_IS = "ieee" if KERNEL_DEVICE == "cuda" else "tf32"
"""IEEE fp32 transposes a weight before; tf32 reads it as it is, and rounds on a GPU alone."""

if KERNEL_DEVICE == "cuda" and torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
    pytest.skip("needs a GPU of 40 GiB", allow_module_level=True)


def untouched(*shape: int, dtype: torch.dtype = FP16) -> torch.Tensor:
    try:
        return torch.empty(*shape, dtype=dtype, device=KERNEL_DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no address space for {shape}: {error}")


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = FP16) -> torch.Tensor:
    return randn(*shape, seed=seed, dtype=dtype).to(KERNEL_DEVICE)


def whole(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=KERNEL_DEVICE)


def check(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert_close({"result": found}, {"result": exact.to(found)}, STRUCTURE[found.dtype], least=1)


def far_rows(width: int, seed: int = 0) -> torch.Tensor:
    """(3, width) whose last row begins at element 2**31 + 16."""
    stride = LIMIT // 2 + 8
    rows = untouched(2 * stride + width).as_strided((3, width), (stride, 1))
    rows.copy_(numbers(3, width, seed=seed))
    return rows


def late(width: int, seed: int = 0) -> tuple[torch.Tensor, int]:
    """(R+2, width) of which only the last two rows have numbers, and R with R*width >= 2**31."""
    before = LIMIT // width
    rows = untouched(before + 2, width)
    rows[before:] = numbers(2, width, seed=seed)
    return rows, before


def late_permutation(before: int, tokens: int) -> Permutation:
    """Top-1 routing of two tokens whose sorted rows are R and R+1; the others do not exist."""
    slots = untouched(before + 2, dtype=torch.int64)
    slots[before:] = whole(tokens - 1, 0)
    return Permutation(slots, slots, slots, whole(before, before + 2, dtype=torch.int32))


def test_rows_far_apart_are_gathered() -> None:
    x = far_rows(16)
    assert torch.equal(gather(x, whole(2, 1, 0, 2)), x[[2, 1, 0, 2]])


class TestRowsAtTheEnd:
    @pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
    def test_row_product(self, transposed) -> None:
        x, before = late(16)
        w = numbers(1, 16, 16, seed=1)
        offsets = whole(before, before + 2, dtype=torch.int32)
        y = row_product(x, w, None, offsets, CONFIG, AS_IT_IS, transposed=transposed)
        meant = w[0].T if transposed else w[0]
        check(y[before:], x[before:].to(FP64) @ meant.to(FP64))

    @pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
    def test_up_projection(self, activation) -> None:
        x, before = late(16)
        w1 = numbers(1, 16, 16, seed=1)
        offsets = whole(before, before + 2, dtype=torch.int32)
        pre, act = up_projection(x, w1, None, offsets, activation, CONFIG, "ieee")
        exact = x[before:].to(FP64) @ w1[0].to(FP64)
        check(pre[before:], exact)
        check(act[before:], activate(exact, activation))

    @pytest.mark.parametrize("config", [CONFIG, DESCRIBED], ids=["plain", "descriptors"])
    def test_weight_gradient(self, config) -> None:
        (a, before), (b, _) = late(16), late(16, seed=1)
        offsets = whole(before, before + 2, dtype=torch.int32)
        dw = weight_gradient(a, b, offsets, config, "ieee", a.dtype)
        check(dw[0], a[before:].to(FP64).T @ b[before:].to(FP64))

    @pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
    def test_activation_gradient(self, activation) -> None:
        """Launched by hand: the launcher would start programs for the tiles of all R rows."""
        gated = activation == "swiglu"
        width = 8 if gated else 16
        pre, before = late(16)
        dact = untouched(before + 2, width)
        dact[before:] = numbers(2, width, seed=1)
        weights = numbers(2, 1, seed=3, dtype=torch.float32)
        slots, _, _, offsets = late_permutation(before, tokens=2)
        dpre = untouched(before + 2, 16)
        db1 = untouched(1, 16, dtype=torch.float32)
        scaled = untouched(before + 2, width)
        dscale = untouched(1, before + 2, dtype=torch.float32)
        launch(
            _activation_gradient_bwd_kernel, (1,), dact, pre, slots, weights, offsets, dpre, db1,
            scaled, dscale, before + 2, E=1, F=width, GATED=gated, WANT_PRE=True, WANT_BIAS=True,
            WANT_ACT=True, WANT_SCALE=True, E_PAD=1, BLOCK_M=16, BLOCK_N=16, num_warps=4,
        )  # fmt: skip
        scale, last, dact = weights.to(FP64).flip(0), pre[before:].to(FP64), dact[before:].to(FP64)
        act = activate(last, activation)
        exact = activate_backward(scale * dact, last, activation)[1]
        check(dpre[before:], exact)
        check(db1[0], exact.sum(0))
        check(scaled[before:], scale * act)
        check(dscale[0, before:], (dact * act).sum(1))

    def test_output_bias_gradient(self) -> None:
        """Launched by hand, for the only tile that has numbers."""
        dy, before = late(16)
        b2, weights = numbers(1, 16, seed=1), numbers(2, 1, seed=2, dtype=torch.float32)
        slots, _, _, offsets = late_permutation(before, tokens=2)
        db2 = untouched(1, 16, dtype=torch.float32)
        dscale = untouched(1, before + 2, dtype=torch.float32)
        launch(
            _output_bias_bwd_kernel, (1,), dy, slots, weights, b2, offsets, db2, dscale, before + 2,
            E=1, H=16, E_PAD=1, BLOCK_M=16, BLOCK_N=16, num_warps=4,
        )  # fmt: skip
        last = dy[before:].to(FP64)
        check(db2, (weights.to(FP64).flip(0) * last).sum(0, keepdim=True))
        check(dscale[0, before:], last @ b2[0].to(FP64))

    def test_combine_gathers_them(self) -> None:
        """Launched by hand: the launcher would start programs for the tokens of all R rows."""
        rows, before = late(16)
        inv_perm, y = whole(before + 1, before), untouched(2, 16)
        launch(
            _combine_fwd_kernel, (1, 1), rows, inv_perm, None, None, y, 2, H=16, K=1, STRIDE=16,
            E=0, WEIGHTED=False, BOUNDED=False, BLOCK_T=16, BLOCK_H=16, num_warps=4,
        )  # fmt: skip
        assert torch.equal(y, rows[before:].flip(0))

    def test_routing_weight_gradient_reads_late_tiles_of_columns(self) -> None:
        """Launched by hand, for the first of 2**27 rows only."""
        num_rows, tiles = LIMIT // 16, 18
        shares = untouched(tiles, num_rows, dtype=torch.float32)
        shares[:, :256] = numbers(tiles, 256, dtype=torch.float32)
        inv_perm = torch.arange(256, device=KERNEL_DEVICE)
        offsets = whole(0, 256, dtype=torch.int32)
        found = untouched(256, dtype=torch.float32)
        launch(
            _sums_bwd_kernel, (1,), None, None, shares, None, offsets, inv_perm, None, None, found,
            num_rows, E=1, P=0, H=0, N=tiles, N_BIAS=0, E_PAD=1, BLOCK_M=16, BLOCK_W=128,
            AT_ONCE=16, BLOCK_S=256, num_warps=4,
        )  # fmt: skip
        check(found, shares[:, :256].to(FP64).sum(0))

    def test_sum_of_tiles(self) -> None:
        """Launched by hand, for the first block of columns only."""
        width, tiles = 2**20, LIMIT // 2**20 + 1
        shares = untouched(tiles, width, dtype=torch.float32)
        shares[:, :128] = numbers(tiles, 128, dtype=torch.float32)
        sums = untouched(1, width, dtype=torch.float32)
        offsets = whole(0, 16 * tiles, dtype=torch.int32)
        launch(
            _sums_bwd_kernel, (1,), shares, None, None, None, offsets, offsets, sums, None, None, 0,
            E=1, P=width, H=0, N=0, N_BIAS=0, E_PAD=1, BLOCK_M=16, BLOCK_W=128, AT_ONCE=16,
            BLOCK_S=256, num_warps=4,
        )  # fmt: skip
        check(sums[0, :128], shares[:, :128].to(FP64).sum(0))


class TestTheLastOfManyExperts:
    EXPERTS, SIDE = 2049, 1024
    TILES = GemmConfig(16, 128, 128, warps=4, stages=1)

    def last_weight(self) -> torch.Tensor:
        w = untouched(self.EXPERTS, self.SIDE, self.SIDE)
        w[-1] = numbers(self.SIDE, self.SIDE, seed=1) / 32
        return w

    def offsets(self) -> torch.Tensor:
        offsets = torch.zeros(self.EXPERTS + 1, dtype=torch.int32, device=KERNEL_DEVICE)
        offsets[-1] = 3
        return offsets

    @pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
    def test_row_product(self, transposed) -> None:
        x, w = numbers(3, self.SIDE), self.last_weight()
        y = row_product(x, w, None, self.offsets(), self.TILES, AS_IT_IS, transposed=transposed)
        meant = w[-1].T if transposed else w[-1]
        check(y, x.to(FP64) @ meant.to(FP64))

    def test_up_projection(self) -> None:
        x, w1 = numbers(3, self.SIDE), self.last_weight()
        pre, _ = up_projection(x, w1, None, self.offsets(), "gelu_tanh", self.TILES, "ieee")
        check(pre, x.to(FP64) @ w1[-1].to(FP64))


@pytest.mark.skipif(KERNEL_DEVICE == "cpu", reason="needs a GPU: 2**31 elements are written")
class TestLargeResults:
    def test_weight_gradient(self) -> None:
        a, b = numbers(3, 1024), numbers(3, 1024, seed=1)
        offsets = torch.zeros(2050, dtype=torch.int32, device=KERNEL_DEVICE)
        offsets[-1] = 3
        config = GemmConfig(128, 128, 32, warps=8, stages=2)
        dw = weight_gradient(a, b, offsets, config, "ieee", a.dtype)
        check(dw[-1], a.to(FP64).T @ b.to(FP64))
        assert not dw[:-1].any()

    def test_combine(self) -> None:
        rows, before = late(16)
        inv_perm = torch.arange(before + 2, device=KERNEL_DEVICE)
        y = combine(rows, inv_perm, 1, None)
        assert torch.equal(y[before:], rows[before:])

    def test_gather(self) -> None:
        x, late_rows = numbers(3, 16), LIMIT // 16
        token_idx = torch.zeros(late_rows + 2, dtype=torch.int64, device=KERNEL_DEVICE)
        token_idx[late_rows:] = whole(2, 1)
        assert torch.equal(gather(x, token_idx)[late_rows:], x[[2, 1]])

    EXPERTS, WIDTH = 2049, 2**20

    def one_row_each(self) -> tuple[torch.Tensor, Permutation]:
        """The same row for each of 2,049 experts, every one of which has a tile of its own."""
        order = torch.arange(self.EXPERTS, device=KERNEL_DEVICE)
        offsets = torch.arange(self.EXPERTS + 1, dtype=torch.int32, device=KERNEL_DEVICE)
        row = numbers(1, self.WIDTH).expand(self.EXPERTS, self.WIDTH).contiguous()
        return row, Permutation(order, order, order, offsets)

    def test_output_bias_gradient(self) -> None:
        dy, permutation = self.one_row_each()
        weights = torch.full((self.EXPERTS, 1), 0.25, device=KERNEL_DEVICE)
        b2 = dy / 1024
        db2, dscale = output_bias_gradient(dy, weights, b2, permutation)
        check(db2[self.EXPERTS - 1], dy[-1].to(FP64) / 4)
        check(dscale[:, -1].sum(), (dy[-1].to(FP64) * b2[-1].to(FP64)).sum())

    def test_activation_gradient(self) -> None:
        dact, permutation = self.one_row_each()
        weights = torch.full((self.EXPERTS, 1), 0.25, device=KERNEL_DEVICE)
        pre, last = torch.ones_like(dact), dact[-1].to(FP64)
        found = activation_gradient(
            dact, pre, weights, permutation, "gelu_tanh",
            want_pre=True, want_bias=True, want_act=False, want_scale=False,
        )  # fmt: skip
        exact = activate_backward(last / 4, pre[-1].to(FP64), "gelu_tanh")[1]
        check(found.dpre_SP[-1], exact)
        check(found.db1_MP[self.EXPERTS - 1], exact)

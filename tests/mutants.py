"""Ways to break the expert MLP, each of which a test has to notice; `mutations.py` tries them.

A file whose kernels are new gets a list of its own here and its tests in `TESTS_OF_FILE`.
"""

from dataclasses import dataclass
from pathlib import Path

PACKAGE = "kernels/emergence_kernels"
PARTS, PRODUCTS, GRADIENTS, OFFSETS, WHOLE, FACTORS = (
    f"tests/test_kernels_{name}.py"
    for name in ("parts", "products", "gradients", "offsets", "expert_mlp", "factors")
)
TESTS_OF_FILE = {
    # those that are closest to the file come first
    "gpu/tiles.py": (PARTS, PRODUCTS, GRADIENTS, WHOLE),
    "gpu/activation_functions.py": (PARTS, WHOLE),
    "gpu/up_projection.py": (PRODUCTS, WHOLE),
    "gpu/row_product.py": (PRODUCTS, WHOLE),
    "gpu/combine.py": (PRODUCTS, WHOLE),
    "gpu/weight_gradient.py": (PRODUCTS, WHOLE),
    "gpu/activation_gradient.py": (GRADIENTS, WHOLE),
    "gpu/small_gradients.py": (GRADIENTS, WHOLE),
    "gpu/expert_mlp.py": (WHOLE, FACTORS),
    "gpu/factors.py": (FACTORS,),
    "gpu/grouped_linear.py": ("tests/test_grouped_linear.py",),
    "gpu/descriptors.py": ("tests/test_kernels_descriptors.py",),
    "gpu/routing.py": ("tests/test_kernels_routing.py",),
    "gpu/routing_gradient.py": ("tests/test_kernels_routing.py",),
    "gpu/permutation.py": ("tests/test_kernels_ops.py", "tests/test_kernels_routing.py"),
}
BATCHES = "tests/test_kernels_batches.py"
PLAIN_TESTS = ("tests/test_kernels_ops.py", BATCHES, "tests/test_moe_dispatch.py")


@dataclass(frozen=True)
class Mutation:
    """One way to break a file."""

    name: str
    file: str
    """Below `kernels/emergence_kernels`."""
    old: str
    new: str

    @property
    def tests(self) -> tuple[str, ...]:
        """Test files that have to notice."""
        tests = TESTS_OF_FILE.get(self.file, PLAIN_TESTS)
        return (OFFSETS, *tests) if "32-bit" in self.name else tests

    @property
    def path(self) -> str:
        return f"{PACKAGE}/{self.file}"

    def apply(self, root: Path) -> None:
        """Change the file under `root`, in which the text has to occur exactly once."""
        path = root / self.path
        source = path.read_text(encoding="utf-8")
        found = source.count(self.old)
        if found != 1:
            raise ValueError(f"{self.name}: its text occurs {found} times in {self.path}")
        path.write_text(source.replace(self.old, self.new), encoding="utf-8")


TILES = [
    Mutation("tile-of-the-expert-before", "gpu/tiles.py", "tiles_E <= tile_m", "tiles_E < tile_m"),
    Mutation(
        "tiles-counted-from-the-first-expert",
        "gpu/tiles.py",
        "start + (tile_m - tiles_before) * BLOCK_M",
        "start + tile_m * BLOCK_M",
    ),
    Mutation(
        "tile-bound-without-the-wasted-tiles",
        "gpu/tiles.py",
        " + max(min(num_experts, num_rows) - 1, 0)",
        "",
    ),
    Mutation(
        "offsets-read-beyond-the-last-expert",
        "gpu/tiles.py",
        "expert_offsets_ptr + e + 1, mask=e < E, other=0",
        "expert_offsets_ptr + e + 1",
    ),
    Mutation(
        "last-group-of-tiles-not-shortened",
        "gpu/tiles.py",
        "tl.minimum(num_tiles_m - first_m, GROUP_M)",
        "GROUP_M",
    ),
    Mutation(
        "no-tail-mask-of-the-reduction-on-rows",
        "gpu/tiles.py",
        "tl.load(a_ptrs, mask=k[None, :] < K - start, other=0.0)",
        "tl.load(a_ptrs)",
    ),
    Mutation(
        "no-tail-mask-of-the-reduction-on-weights",
        "gpu/tiles.py",
        "tl.load(w_ptrs, mask=k[:, None] < K - start, other=0.0)",
        "tl.load(w_ptrs)",
    ),
    Mutation(
        "wrong-stride-along-the-reduction",
        "gpu/tiles.py",
        "w_ptrs += BLOCK_K * STRIDE_K",
        "w_ptrs += BLOCK_K",
    ),
    Mutation(
        "accumulated-in-the-input-dtype",
        "gpu/tiles.py",
        "accumulator = tl.dot(a, w, accumulator, input_precision=PRECISION)",
        "accumulator = tl.dot(a, w, accumulator, input_precision=PRECISION)"
        ".to(a.dtype).to(tl.float32)",
    ),
    Mutation(
        "chains-of-the-reduction-overlap",
        "gpu/tiles.py",
        "tl.minimum(first + STEP, K)",
        "K",
    ),
]
UP_PROJECTION = [
    Mutation(
        "up-no-row-tail-mask",
        "gpu/up_projection.py",
        "inside = (row < end)[:, None] & (column < F)[None, :]",
        "inside = (row >= 0)[:, None] & (column < F)[None, :]",
    ),
    Mutation(
        "up-no-column-mask",
        "gpu/up_projection.py",
        "inside = (row < end)[:, None] & (column < F)[None, :]",
        "inside = (row < end)[:, None] & (column >= 0)[None, :]",
    ),
    Mutation("up-bias-dropped", "gpu/up_projection.py", "pre += tl.load(b1", "tl.load(b1"),
    Mutation(
        "up-bias-of-the-gate-on-the-up-half",
        "gpu/up_projection.py",
        "b1_ptr + expert * P + F + column % F",
        "b1_ptr + expert * P + column % F",
    ),
    Mutation(
        "up-halves-of-a-tile-in-the-wrong-order",
        "gpu/up_projection.py",
        "left, right = halves(pre)",
        "right, left = halves(pre)",
    ),
    Mutation(
        "up-halves-of-the-up-tile-in-the-wrong-order",
        "gpu/up_projection.py",
        "up_left, up_right = halves(up) if GATED",
        "up_right, up_left = halves(up) if GATED",
    ),
    Mutation(
        "up-SwiGLU-halves-swapped",
        "gpu/up_projection.py",
        "silu(pre)[0] * up",
        "silu(up)[0] * pre",
    ),
    Mutation(
        "up-32-bit-offset-of-the-results-row",
        "gpu/up_projection.py",
        "wide_row = row.to(tl.int64)[:, None]",
        "wide_row = row[:, None]",
    ),
    Mutation(
        "up-32-bit-offset-of-the-row",
        "gpu/up_projection.py",
        "tl.where(row < end, row, 0).to(tl.int64)",
        "tl.where(row < end, row, 0)",
    ),
    Mutation(
        "up-persistent-programs-skip-tiles",
        "gpu/up_projection.py",
        "tiles_m * tiles_n, tl.num_programs(0))",
        "tiles_m * tiles_n, tl.num_programs(0) + 1)",
    ),
    Mutation(
        "up-activation-of-the-rounded-pre-activation",
        "gpu/up_projection.py",
        "act = gelu_tanh(pre)[0]",
        "act = gelu_tanh(pre.to(pre_ptr.dtype.element_ty).to(tl.float32))[0]",
    ),
]
ROW_PRODUCT = [
    Mutation(
        "rows-transposed-flag-ignored",
        "gpu/row_product.py",
        "= I if TRANSPOSED else 1",
        "= 1",
    ),
    Mutation(
        "rows-weight-as-it-is-where-its-transpose-is-meant",
        "gpu/row_product.py",
        "w, transposed = w.mT.contiguous(), False",
        "w, transposed = w.reshape(w.mT.shape), False",
    ),
    Mutation("rows-bias-dropped", "gpu/row_product.py", "y += tl.load(bias", "tl.load(bias"),
    Mutation(
        "rows-bias-of-the-first-expert-for-all",
        "gpu/row_product.py",
        "bias_ptr + expert * O",
        "bias_ptr + 0 * O",
    ),
    Mutation(
        "rows-32-bit-offset-of-the-weight",
        "gpu/row_product.py",
        "w_ptr + expert * (I * O)",
        "w_ptr + expert.to(tl.int32) * (I * O)",
    ),
    Mutation(
        "rows-32-bit-offset-of-the-row",
        "gpu/row_product.py",
        "tl.where(row < end, row, 0).to(tl.int64)",
        "tl.where(row < end, row, 0)",
    ),
    Mutation(
        "rows-no-row-tail-mask",
        "gpu/row_product.py",
        "mask=(row < end)[:, None] & (column < O)[None, :]",
        "mask=(column < O)[None, :]",
    ),
    Mutation(
        "rows-no-column-mask",
        "gpu/row_product.py",
        "mask=(row < end)[:, None] & (column < O)[None, :]",
        "mask=(row < end)[:, None]",
    ),
]
COMBINE = [
    Mutation(
        "combine-last-slot-dropped",
        "gpu/combine.py",
        "tl.static_range(K)",
        "tl.static_range(K - 1 if K > 1 else K)",
    ),
    Mutation(
        "combine-weights-ignored",
        "gpu/combine.py",
        "part = part * weight.to(tl.float32)[:, None]",
        "part = part * 1.0",
    ),
    Mutation(
        "combine-rounded-after-every-slot",
        "gpu/combine.py",
        "total += part",
        "total = (total + part).to(y_ptr.dtype.element_ty).to(tl.float32)",
    ),
    Mutation(
        "combine-32-bit-offset-of-the-row",
        "gpu/combine.py",
        "rows_ptr + row[:, None] * STRIDE",
        "rows_ptr + row.to(tl.int32)[:, None] * STRIDE",
    ),
    Mutation(
        "combine-rows-taken-for-contiguous",
        "gpu/combine.py",
        "row[:, None] * STRIDE",
        "row[:, None] * H",
    ),
    Mutation(
        "combine-no-row-mask",
        "gpu/combine.py",
        "(t < num_tokens)[:, None] & (h < H)[None, :]",
        "(t >= 0)[:, None] & (h < H)[None, :]",
    ),
    Mutation(
        "combine-no-column-mask",
        "gpu/combine.py",
        "(t < num_tokens)[:, None] & (h < H)[None, :]",
        "(t < num_tokens)[:, None] & (h >= 0)[None, :]",
    ),
]
ACTIVATION_GRADIENT = [
    Mutation(
        "through-weight-missing-in-the-pre-activations-gradient",
        "gpu/activation_gradient.py",
        "dact *= scale[:, None]",
        "dact *= 1.0",
    ),
    Mutation(
        "through-weight-missing-in-dW2s-factor",
        "gpu/activation_gradient.py",
        "(act * scale[:, None])",
        "act",
    ),
    Mutation(
        "through-no-row-tail-mask",
        "gpu/activation_gradient.py",
        "inside = (row < end)[:, None] & (column < F)[None, :]",
        "inside = (row >= 0)[:, None] & (column < F)[None, :]",
    ),
    Mutation(
        "through-no-column-mask",
        "gpu/activation_gradient.py",
        "inside = (row < end)[:, None] & (column < F)[None, :]",
        "inside = (row < end)[:, None] & (column >= 0)[None, :]",
    ),
    Mutation(
        "through-gates-slope-without-the-up-half",
        "gpu/activation_gradient.py",
        "slope = slope * up",
        "slope = slope * 1.0",
    ),
    Mutation(
        "through-halves-of-the-gradient-in-one-place",
        "gpu/activation_gradient.py",
        "dup_ptrs = dpre_ptr + pre_offsets + F",
        "dup_ptrs = dpre_ptr + pre_offsets",
    ),
    Mutation(
        "through-up-halfs-gradient-from-the-rows-of-the-gates-bias",
        "gpu/activation_gradient.py",
        "tile_m.to(tl.int64) * P + F + column",
        "tile_m.to(tl.int64) * P + column",
    ),
    Mutation(
        "through-weight-of-the-sorted-row-not-of-its-slot",
        "gpu/activation_gradient.py",
        "weights_ptr + slot, mask",
        "weights_ptr + row, mask",
    ),
    Mutation(
        "through-32-bit-offset-of-the-row",
        "gpu/activation_gradient.py",
        "wide_row = row.to(tl.int64)[:, None]",
        "wide_row = row[:, None]",
    ),
    Mutation(
        "through-column-tiles-share-one-row-of-partial-sums",
        "gpu/activation_gradient.py",
        "dscale_ptr + tile_n.to(tl.int64) * num_rows + row",
        "dscale_ptr + row",
    ),
    Mutation(
        "through-gradient-in-memory-of-its-own",
        "gpu/activation_gradient.py",
        "dact_SF if not gated else torch.empty_like(pre_SP)",
        "torch.empty_like(pre_SP)",
    ),
]
WEIGHT_GRADIENT = [
    Mutation(
        "dW-one-row-of-the-next-expert",
        "gpu/weight_gradient.py",
        "tl.load(expert_offsets_ptr + expert + 1)",
        "tl.load(expert_offsets_ptr + expert + 1) + 1",
    ),
    Mutation(
        "dW-nothing-written-for-an-expert-without-rows",
        "gpu/weight_gradient.py",
        "mask=(i < I)[:, None] & (o < O)[None, :]",
        "mask=(i < I)[:, None] & (o < O)[None, :] & (start < end)",
    ),
    Mutation(
        "dW-left-factors-tail-rows-not-masked",
        "gpu/weight_gradient.py",
        "a = tl.load(a_ptrs, mask=(row < end)[None, :], other=0.0)",
        "a = tl.load(a_ptrs)",
    ),
    Mutation(
        "dW-right-factors-tail-rows-not-masked",
        "gpu/weight_gradient.py",
        "b = tl.load(b_ptrs, mask=(row < end)[:, None], other=0.0)",
        "b = tl.load(b_ptrs)",
    ),
    Mutation(
        "dW-described-left-factors-tail-rows-not-masked",
        "gpu/weight_gradient.py",
        "tl.where(mine[:, None], a_ptr.load([last, tile_m * BLOCK_M]), 0.0)",
        "a_ptr.load([last, tile_m * BLOCK_M])",
    ),
    Mutation(
        "dW-described-right-factors-tail-rows-not-masked",
        "gpu/weight_gradient.py",
        "tl.where(mine[:, None], b_ptr.load([last, tile_n * BLOCK_N]), 0.0)",
        "b_ptr.load([last, tile_n * BLOCK_N])",
    ),
    Mutation(
        "dW-described-tail-one-row-short",
        "gpu/weight_gradient.py",
        "mine = last + tl.arange(0, BLOCK_K) < end",
        "mine = last + tl.arange(0, BLOCK_K) < end - 1",
    ),
    Mutation(
        "dW-described-blocks-counted-from-the-first-row-of-all",
        "gpu/weight_gradient.py",
        "last = end - (end - start) % BLOCK_K",
        "last = end - end % BLOCK_K",
    ),
    Mutation(
        "dW-chains-of-rows-overlap",
        "gpu/weight_gradient.py",
        "last = tl.minimum(first + CHAIN, end)",
        "last = end",
    ),
    Mutation(
        "dW-32-bit-offset-of-the-row",
        "gpu/weight_gradient.py",
        "(first + tl.arange(0, BLOCK_K)).to(tl.int64)",
        "first + tl.arange(0, BLOCK_K)",
    ),
    Mutation(
        "dW-no-column-mask",
        "gpu/weight_gradient.py",
        "mask=(i < I)[:, None] & (o < O)[None, :]",
        "mask=(i < I)[:, None] & (o >= 0)[None, :]",
    ),
    Mutation(
        "dW-accumulated-in-the-input-dtype",
        "gpu/weight_gradient.py",
        "accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)",
        "accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)"
        ".to(a.dtype).to(tl.float32)",
    ),
    Mutation(
        "dW-rounded-to-the-dtype-of-its-factors",
        "gpu/weight_gradient.py",
        "    return dw_EIO\n",
        "    return dw_EIO.to(a_SI.dtype).to(dtype)\n",
    ),
    Mutation(
        "dW-tile-of-another-expert",
        "gpu/weight_gradient.py",
        "expert = tile // (tiles_m * tiles_n)",
        "expert = tile % E",
    ),
]
SMALL_GRADIENTS = [
    Mutation(
        "routing-weights-gradient-without-the-bias",
        "gpu/small_gradients.py",
        "total += _sum_of_shares(bias_dscale_ptr, row, end, num_rows, N_BIAS, BLOCK_S)",
        "total += 0.0",
    ),
    Mutation(
        "routing-weights-gradient-in-sorted-order",
        "gpu/small_gradients.py",
        "tl.store(dweights_ptr + slot",
        "tl.store(dweights_ptr + row",
    ),
    Mutation(
        "routing-weights-gradient-of-the-first-column-tile-every-time",
        "gpu/small_gradients.py",
        "share.to(tl.int64)[:, None] * num_rows",
        "share.to(tl.int64)[:, None] * 0",
    ),
    Mutation(
        "routing-weights-gradient-of-the-first-column-tiles-only",
        "gpu/small_gradients.py",
        "range(0, N, AT_ONCE)",
        "range(0, 1, AT_ONCE)",
    ),
    Mutation(
        "routing-weights-gradient-of-column-tiles-that-are-none",
        "gpu/small_gradients.py",
        "(share < N)[:, None] & (row < end)[None, :]",
        "(row < end)[None, :]",
    ),
    Mutation(
        "routing-weights-gradient-of-rows-without-an-expert",
        "gpu/small_gradients.py",
        "        inside = (share < N)[:, None] & (row < end)[None, :]",
        "        inside = (share < N)[:, None] & (row < num_rows)[None, :]",
    ),
    Mutation(
        "combine-of-rows-without-an-expert",
        "gpu/combine.py",
        "            there = inside & (row < tl.load(expert_offsets_ptr + E))[:, None]",
        "            there = inside",
    ),
    Mutation(
        "sum-of-tiles-last-tile-dropped",
        "gpu/small_gradients.py",
        "range(last - count, last, AT_ONCE)",
        "range(last - count, last - 1, AT_ONCE)",
    ),
    Mutation(
        "sum-of-tiles-the-next-experts-tiles-included",
        "gpu/small_gradients.py",
        "(tile < last)[:, None] & (w < W)[None, :]",
        "(w < W)[None, :]",
    ),
    Mutation(
        "sum-of-tiles-32-bit-offset-of-the-tile",
        "gpu/small_gradients.py",
        "tile.to(tl.int64)[:, None] * W",
        "tile[:, None] * W",
    ),
    Mutation(
        "sums-of-b2-begin-among-those-of-b1",
        "gpu/small_gradients.py",
        "program - before_b2, db2_tiles_ptr",
        "program, db2_tiles_ptr",
    ),
    Mutation(
        "sums-of-b2-run-into-the-routing-weights",
        "gpu/small_gradients.py",
        "if (program >= before_b2) & (program < before_weights):",
        "if program >= before_b2:",
    ),
    Mutation(
        "sums-of-the-routing-weights-begin-too-early",
        "gpu/small_gradients.py",
        "if program >= before_weights:",
        "if program >= before_b2:",
    ),
    Mutation(
        "db2-without-the-routing-weight",
        "gpu/small_gradients.py",
        "tl.sum(dy * scale, 0)",
        "tl.sum(dy, 0)",
    ),
    Mutation(
        "db2-32-bit-offset-of-the-row",
        "gpu/small_gradients.py",
        "row.to(tl.int64)[:, None] * H",
        "row[:, None] * H",
    ),
]
ACTIVATIONS = [
    Mutation(
        "derivative-of-GELU-wrong",
        "gpu/activation_functions.py",
        "gate + act * (t * gate) * slope",
        "gate + act * (t * gate)",
    ),
    Mutation(
        "derivative-of-GELU-by-cancellation",
        "gpu/activation_functions.py",
        "(t * gate) * slope",
        "(1.0 - gate) * slope",
    ),
    Mutation(
        "GELU-of-large-negative-numbers-overflows",
        "gpu/activation_functions.py",
        "tl.maximum(x, -9.9,",
        "tl.maximum(x, -1e9,",
    ),
    Mutation(
        "derivative-of-SiLU-wrong",
        "gpu/activation_functions.py",
        "gate * (1.0 + x * (1.0 - gate))",
        "gate * (1.0 - x * (1.0 - gate))",
    ),
]
ASSEMBLY = [
    Mutation(
        "forward-without-b2",
        "gpu/expert_mlp.py",
        "        b2_EH,\n        offsets,\n        plan.down,",
        "        None,\n        offsets,\n        plan.down,",
    ),
    Mutation(
        "db1-dropped",
        "gpu/expert_mlp.py",
        "        through.db1_MP,\n",
        "        None,\n",
    ),
    Mutation(
        "db2-dropped",
        "gpu/expert_mlp.py",
        "db2_MH if want_b2 else None",
        "0 * db2_MH if want_b2 else None",
    ),
    Mutation(
        "db2-summed-although-nobody-asked",
        "gpu/expert_mlp.py",
        "db2_MH if want_b2 else None",
        "db2_MH",
    ),
    Mutation(
        "w1s-strides-taken-for-contiguous",
        "gpu/expert_mlp.py",
        "offsets = permutation.expert_offsets\n    w1, w1_transposed = as_stored(w1_EHP)\n",
        "offsets = permutation.expert_offsets\n    w1, w1_transposed = w1_EHP, False\n",
    ),
    Mutation(
        "up-projection-of-a-transposed-weight-as-if-it-were-none",
        "gpu/up_projection.py",
        "STRIDE_K: tl.constexpr = 1 if TRANSPOSED else P",
        "STRIDE_K: tl.constexpr = P",
    ),
    Mutation(
        "transposed-gradient-of-w1-taken-for-plain",
        "gpu/expert_mlp.py",
        "x_SH, dpre_SP, offsets, plan.weight_grad, precision, dtype, transposed=w1_transposed",
        "x_SH, dpre_SP, offsets, plan.weight_grad, precision, dtype",
    ),
    Mutation(
        "grouped-linears-rows-without-an-expert-as-they-are",
        "gpu/grouped_linear.py",
        "return clear_rest(y_SO, expert_offsets[-1])",
        "return y_SO",
    ),
    Mutation(
        "grouped-linears-input-gradient-from-the-weight-itself",
        "gpu/grouped_linear.py",
        "            transposed=not transposed,",
        "            transposed=transposed,",
    ),
    Mutation(
        "xs-columns-taken-for-contiguous",
        "gpu/expert_mlp.py",
        "gather(with_contiguous_rows(x_TH), permutation.token_idx)",
        "gather(x_TH, permutation.token_idx)",
    ),
    Mutation(
        "xs-columns-taken-for-contiguous-in-the-gradient",
        "gpu/expert_mlp.py",
        "gather(with_contiguous_rows(x_TH), token_idx_S)",
        "gather(x_TH, token_idx_S)",
    ),
    Mutation(
        "dys-columns-taken-for-contiguous",
        "gpu/expert_mlp.py",
        "gather(with_contiguous_rows(dy_TH), token_idx_S)",
        "gather(dy_TH, token_idx_S)",
    ),
    Mutation(
        "biases-gradients-in-the-dtype-of-the-tokens",
        "gpu/expert_mlp.py",
        "        weights_TK,\n        dtype,\n",
        "        weights_TK,\n        x_TH.dtype,\n",
    ),
    Mutation(
        "tf32-activations-not-rounded-for-dw2",
        "gpu/expert_mlp.py",
        "act_SF = as_factor(through.scaled_act_SF, precision, in_place=True)",
        "act_SF = through.scaled_act_SF",
    ),
    Mutation(
        "tf32-gradient-of-the-output-rounded-for-db2",
        "gpu/expert_mlp.py",
        "dy_factor = as_factor(dy_SH, precision)",
        "dy_factor = as_factor(dy_SH, precision, in_place=True)",
    ),
    Mutation(
        "tf32-low-bits-dropped",
        "gpu/factors.py",
        "bits = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000",
        "bits = bits & -0x2000",
    ),
    Mutation(
        "tf32-ties-away-from-zero",
        "gpu/factors.py",
        "0xFFF + ((bits >> 13) & 1)",
        "0x1000",
    ),
    Mutation(
        "tf32-a-NaN-becomes-infinite",
        "gpu/factors.py",
        "tl.where(x == x, bits.to(tl.float32, bitcast=True), x)",
        "bits.to(tl.float32, bitcast=True)",
    ),
    Mutation(
        "biass-part-of-the-routing-weights-gradient-lost",
        "gpu/expert_mlp.py",
        "        bias_dscale_NS,\n",
        "        None,\n",
    ),
]
PLAIN = [
    Mutation(
        "batched-routing-weights-gradient-without-the-bias",
        "expert_mlp_batched.py",
        "baddbmm_(wide_dy_BRH, b2_BH1)",
        "baddbmm_(0 * wide_dy_BRH, b2_BH1)",
    ),
    Mutation(
        "batched-routing-weight-missing-in-dW2",
        "expert_mlp_batched.py",
        "act_QF.mul_(scale_q1)\n",
        "pass\n",
    ),
    Mutation(
        "batched-routing-weight-missing-in-db2",
        "expert_mlp_batched.py",
        "wide_dy_BRH * batch.view(scale_q1)",
        "wide_dy_BRH * 1",
    ),
    Mutation(
        "batched-routing-weight-missing-in-the-pre-activations-gradient",
        "expert_mlp_batched.py",
        "dpre_QP.mul_(scale_q1)\n",
        "pass\n",
    ),
    Mutation(
        "batched-sorted-rows-taken-for-tokens",
        "expert_mlp_batched.py",
        "tokens_Q = layout.tokens_Q[rows]\n",
        "tokens_Q = layout.rows_Q[rows] % len(x_TH)\n",
    ),
    Mutation(
        "batched-db1-of-the-next-gradients-rows",
        "expert_mlp_batched.py",
        "batch.view(dpre_QP).sum(1)",
        "batch.view(dpre_QP.roll(1, 0)).sum(1)",
    ),
    Mutation(
        "batched-combined-in-the-input-dtype",
        "expert_mlp_batched.py",
        "layout.combine(out_QH, permutation.inv_perm, weights_TK.shape[1], weights)",
        "layout.combine(out_QH.to(x_TH.dtype), permutation.inv_perm, weights_TK.shape[1], "
        "None if weights is None else weights.to(x_TH.dtype))",
    ),
    Mutation(
        "batched-forward-without-b2",
        "expert_mlp_batched.py",
        "bias = None if b2_EH is None else b2_EH[experts].unsqueeze(1).to(dtype)",
        "bias = None",
    ),
    Mutation(
        "batched-padding-counts",
        "batches.py",
        "scale_Q = scale_Q.masked_fill_(~self._used_Q, 0)",
        "pass",
    ),
    Mutation(
        "batched-padding-of-another-expert",
        "batches.py",
        "torch.minimum(row_Q, last_Q)",
        "row_Q.clamp(max=len(sorted_S) - 1)",
    ),
    Mutation(
        "batched-last-slot-dropped",
        "batches.py",
        ".view(-1, top_k)\n        return",
        ".view(-1, top_k)[:, :-1]\n        return",
    ),
    Mutation(
        "batched-unwritten-gradient-of-experts-without-rows",
        "expert_mlp_batched.py",
        "gradient[layout.without_rows] = 0",
        "pass",
    ),
    Mutation(
        "gelu-backward-as-a-difference",
        "activations.py",
        "power_SF.mul_(sigmoid_SF)\n",
        "1 - sigmoid_SF\n",
    ),
    Mutation(
        "plain-SwiGLU-halves-swapped-in-the-gradient",
        "activations.py",
        "grad_gate_SF, grad_up_SF = grad_SP.chunk(2, dim=-1)",
        "grad_up_SF, grad_gate_SF = grad_SP.chunk(2, dim=-1)",
    ),
    Mutation(
        "product-unwritten-gradient-of-experts-without-rows",
        "grouped_gemm.py",
        "torch.mm(x_SI[a:b].t(), dy_SO[a:b], out=dw_EIO[e])",
        "a == b or torch.mm(x_SI[a:b].t(), dy_SO[a:b], out=dw_EIO[e])",
    ),
    Mutation("unstable-sort", "permutation.py", "stable=True", "stable=False"),
]
DESCRIPTORS = [
    Mutation(
        "described-weight-of-the-first-expert-for-all",
        "gpu/descriptors.py",
        "w.load([expert, start, first_column])",
        "w.load([expert * 0, start, first_column])",
    ),
    Mutation(
        "described-rows-of-the-first-tile-for-all",
        "gpu/descriptors.py",
        "x.load([first_row, start])",
        "x.load([0, start])",
    ),
    Mutation(
        "described-weight-transposed-from-the-wrong-column",
        "gpu/descriptors.py",
        "w.load([expert, first_column, start])",
        "w.load([expert, 0, start])",
    ),
]
ROUTING = [
    Mutation(
        "route-ties-to-the-last-expert",
        "gpu/routing.py",
        "first = tl.min(tl.where(scores == best[:, None], e[None, :], E_PAD), 1)",
        "first = tl.max(tl.where(scores == best[:, None], e[None, :], -1), 1)",
    ),
    Mutation(
        "route-counts-tokens-past-the-end",
        "gpu/routing.py",
        "tl.sum(tl.where(real, assigned, 0), 0)",
        "tl.sum(assigned, 0)",
    ),
    Mutation(
        "route-names-an-expert-that-does-not-exist",
        "gpu/routing.py",
        "tl.minimum(first, E - 1)",
        "first",
    ),
    Mutation(
        "route-gradient-without-the-renormalisation",
        "gpu/routing_gradient.py",
        "(dweight - mean) / total",
        "dweight / total",
    ),
    Mutation(
        "route-gradient-of-the-z-loss-halved",
        "gpu/routing_gradient.py",
        "(2.0 * tl.load(dz_ptr) * logsumexp)",
        "(tl.load(dz_ptr) * logsumexp)",
    ),
    Mutation(
        "route-gradient-of-the-noisy-probabilities-taken-at-the-clean-ones",
        "gpu/routing_gradient.py",
        "_through_softmax(noisy, of_noisy)",
        "_through_softmax(probs, of_noisy)",
    ),
]
SORTING = [
    Mutation(
        "sort-blocks-in-the-wrong-order",
        "gpu/permutation.py",
        "(block < this)[:, None]",
        "(block > this)[:, None]",
    ),
    Mutation(
        "sort-slots-taken-for-tokens",
        "gpu/permutation.py",
        "tl.store(token_idx_ptr + row, slot // K,",
        "tl.store(token_idx_ptr + row, slot,",
    ),
    Mutation(
        "sort-last-offset-missing",
        "gpu/permutation.py",
        "tl.store(expert_offsets_ptr + E, num_slots)",
        "tl.store(expert_offsets_ptr + E, 0)",
    ),
    Mutation(
        "sort-every-piece-ranked-as-the-first",
        "gpu/permutation.py",
        "next_E += tl.sum(one_hot, 0)",
        "next_E += 0",
    ),
    Mutation(
        "sort-only-the-last-piece-of-a-block-counted",
        "gpu/permutation.py",
        "count_E += tl.sum(",
        "count_E = tl.sum(",
    ),
]
MUTATIONS = [
    *DESCRIPTORS,
    *ROUTING,
    *SORTING,
    *TILES,
    *UP_PROJECTION,
    *ROW_PRODUCT,
    *COMBINE,
    *ACTIVATION_GRADIENT,
    *WEIGHT_GRADIENT,
    *SMALL_GRADIENTS,
    *ACTIVATIONS,
    *ASSEMBLY,
    *PLAIN,
]

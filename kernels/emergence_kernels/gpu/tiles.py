"""Device functions shared by the grouped products: which tile to compute, and its accumulation.

Rows are sorted by expert and experts start anywhere, so tiles of BLOCK_M rows are laid per expert
and numbered through. A program finds its expert from the E+1 offsets alone: no table is built, and
nothing about the routing has to be known on the host but the bound `tile_bound`.
"""

import triton
import triton.language as tl

from .launch import cdiv


def tile_bound(num_rows: int, num_experts: int, block_m: int) -> int:
    """Most tiles of `block_m` rows that any routing of `num_rows` rows to the experts can need.

    Every expert with rows wastes less than one tile, and there are no more such experts than rows.
    """
    return cdiv(num_rows, block_m) + max(min(num_experts, num_rows) - 1, 0)


@triton.jit
def expert_tiles(expert_offsets_ptr, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr):
    """First row, end row, and number of tiles up to and including it, of every expert (E_PAD,)."""
    e = tl.arange(0, E_PAD)
    start_E = tl.load(expert_offsets_ptr + e, mask=e < E, other=0)
    end_E = tl.load(expert_offsets_ptr + e + 1, mask=e < E, other=0)
    return start_E, end_E, tl.cumsum((end_E - start_E + BLOCK_M - 1) // BLOCK_M, 0)


@triton.jit
def locate_tile(tile_m, start_E, end_E, tiles_E, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first row of the tile, end row of the expert) of tile `tile_m`."""
    expert = tl.sum((tiles_E <= tile_m).to(tl.int32), 0)
    mine = tl.arange(0, E_PAD) == expert
    start = tl.sum(tl.where(mine, start_E, 0), 0)
    end = tl.sum(tl.where(mine, end_E, 0), 0)
    tiles_before = tl.sum(
        tl.where(mine, tiles_E - (end_E - start_E + BLOCK_M - 1) // BLOCK_M, 0), 0
    )
    return expert.to(tl.int64), start + (tile_m - tiles_before) * BLOCK_M, end


@triton.jit
def grouped_order(tile, num_tiles_m, num_tiles_n, GROUP_M: tl.constexpr):
    """(tile_m, tile_n) in an order in which GROUP_M row tiles share the weights in the L2 cache."""
    tiles_in_group = GROUP_M * num_tiles_n
    group = tile // tiles_in_group
    first_m = group * GROUP_M
    group_size = tl.minimum(num_tiles_m - first_m, GROUP_M)
    within = tile % tiles_in_group
    return first_m + within % group_size, within // group_size


CHAIN = tl.constexpr(128)
"""How many products are added one after another in fp32 where there are no matrix units.

There a product is a chain of roundings, whose error grows with its length; a sum of short chains is
nearer to the exact one.
"""


@triton.jit
def _multiply_chain(
    a_ptr, row_offsets, w_ptr, columns, first, last, K: tl.constexpr, STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`multiply_rows` from `first` to `last` of K."""
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + row_offsets[:, None] + (first + k)[None, :]
    w_ptrs = w_ptr + (first + k)[:, None] * STRIDE_K + columns[None, :] * STRIDE_N
    accumulator = tl.zeros((row_offsets.shape[0], columns.shape[0]), dtype=tl.float32)
    for start in range(first, last, BLOCK_K):
        if K % BLOCK_K == 0:
            a = tl.load(a_ptrs)
            w = tl.load(w_ptrs)
        else:
            # both factors: what lies behind the last element may be NaN, and NaN times 0 is NaN
            a = tl.load(a_ptrs, mask=k[None, :] < K - start, other=0.0)
            w = tl.load(w_ptrs, mask=k[:, None] < K - start, other=0.0)
        accumulator = tl.dot(a, w, accumulator, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * STRIDE_K
    return accumulator


@triton.jit
def multiply_rows(
    a_ptr,  # rows of the left factor, each with K contiguous elements
    row_offsets,  # (BLOCK_M,) int64: where each row starts
    w_ptr,  # one expert's weight: element (k, n) at k * STRIDE_K + n * STRIDE_N
    columns,  # (BLOCK_N,) int32: n, all inside the weight
    K: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) fp32: rows times columns of one weight."""
    if a_ptr.dtype.element_ty == tl.float32 and PRECISION == "ieee":
        STEP: tl.constexpr = CHAIN if BLOCK_K < CHAIN else BLOCK_K
        accumulator = tl.zeros((row_offsets.shape[0], columns.shape[0]), dtype=tl.float32)
        for first in range(0, K, STEP):
            accumulator += _multiply_chain(
                a_ptr, row_offsets, w_ptr, columns, first, tl.minimum(first + STEP, K), K,
                STRIDE_K, STRIDE_N, BLOCK_K, PRECISION,
            )  # fmt: skip
        return accumulator
    else:
        return _multiply_chain(
            a_ptr, row_offsets, w_ptr, columns, 0, K, K, STRIDE_K, STRIDE_N, BLOCK_K, PRECISION
        )


@triton.jit
def halves(tile):
    """The left and the right columns of a tile; an epilogue on half needs half the registers."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))

"""How long the kernels of the expert MLP take on a GPU, predicted from their tiles and bytes.

A product of grouped rows is tiles of BLOCK_M x BLOCK_N, spread over the multiprocessors. A tile's
main loop takes as long as the slowest of its matrix instructions, their reads of shared memory, and
the loads through the L2 cache that all multiprocessors share. Before and after it the pipeline is
filled and the results are written, which only another block on the same multiprocessor can hide. No
kernel is faster than its bytes through the memory. docs/performance.md has it beside what was
measured.

Letters: H model width, F expert width, P pre-activation width, E experts, S routed rows.
"""

from dataclasses import dataclass

from ..activations import Activation, pre_activation_width
from .activation_gradient import ROWS_PER_TILE
from .gemm_config import GemmConfig, GemmPlan, Product
from .launch import cdiv


@dataclass(frozen=True)
class Device:
    """Figures of a GPU, and three that were fitted to measurements of one."""

    name: str
    multiprocessors: int
    clock_hz: float
    """At which the peak is stated."""
    flops_per_clock: int
    """Of one multiprocessor's matrix units, 16-bit factors; a multiplication and an addition count
    as two."""
    memory_bytes_per_s: float
    shared_bytes: int
    """Shared memory of one multiprocessor."""
    sustained: float = 0.8
    """Part of the peak that a large product reaches, measured (791 of 989 TFLOP/s on an H200)."""
    cache_bytes_per_s: float = 12e12
    """From L2 to all multiprocessors; fitted."""
    tile_s: float = 2.5e-6
    """To fill a tile's pipeline and to drain it; fitted."""
    start_s: float = 14e-6
    """To start a product whose factors are in no cache, and to end it; fitted."""
    short_start_s: float = 2e-6
    """To start and end a kernel without a pipeline, as measured by a profiler at the least."""


H100 = Device("H100 SXM", 132, 1.83e9, 4096, 3.35e12, 233_472)
H200 = Device("H200", 132, 1.83e9, 4096, 4.8e12, 233_472)
"""NVIDIA's data sheets: 989 TFLOP/s in bf16, 3.35 and 4.8 TB/s."""

_BYTES = 2
"""Of an element."""
_REGISTERS = 65_536
_SHARED_BYTES_PER_CLOCK = 128
_LANES = 128
"""Instructions for one element that a multiprocessor issues in a clock."""
_FORWARD_INSTRUCTIONS, _BACKWARD_INSTRUCTIONS = 17, 36
"""For an element of an activation: 1,102 a thread for 64 in the up projection's epilogue, 1,140 for
32 in the activation gradient; counted in what Triton 3.6 compiles for sm_90."""


@dataclass(frozen=True)
class Layer:
    """The shape of one call, in 16 bits."""

    rows: int
    """S."""
    hidden: int
    width: int
    experts: int
    activation: Activation = "gelu_tanh"

    @property
    def pre_width(self) -> int:
        """P."""
        return pre_activation_width(self.activation, self.width)


def product_seconds(
    product: Product, layer: Layer, config: GemmConfig, device: Device, registers: int | None = None
) -> float:
    """One product under `config`, with the rows spread evenly over the experts.

    `registers` of a thread, where known; else the accumulator's and a common 64 more.
    """
    rows, size = layer.rows, _BYTES
    if product == "weight_grad":
        inner, outer, written = cdiv(rows, layer.experts), layer.pre_width, 1
        tiles = layer.experts * _tiles(layer.hidden, outer, config)
        moved = rows * (layer.hidden + outer) + layer.experts * layer.hidden * outer
    else:
        inner, outer = {
            "up": (layer.hidden, layer.pre_width),
            "down": (layer.width, layer.hidden),
            "activation_grad": (layer.hidden, layer.width),
            "input_grad": (layer.pre_width, layer.hidden),
        }[product]
        tiles = layer.experts * _tiles(cdiv(rows, layer.experts), outer, config)
        written = 2 if product == "up" else 1
        moved = rows * (inner + outer * written) + layer.experts * inner * outer
    steps = cdiv(inner, config.block_k)
    clock = device.clock_hz * device.sustained
    main = steps * max(
        2 * config.block_m * config.block_n * config.block_k / device.flops_per_clock / clock,
        _shared_reads(config, size) / _SHARED_BYTES_PER_CLOCK / clock,
        _tile_bytes(config, size) * device.multiprocessors / device.cache_bytes_per_s,
    )
    results = config.block_m * config.block_n * size * written
    ends = device.tile_s + results * device.multiprocessors / device.cache_bytes_per_s
    if product == "up":
        ends += config.block_m * config.block_n * _FORWARD_INSTRUCTIONS / _LANES / clock
    blocks = _blocks(config, size, device, registers)
    mine = cdiv(tiles, device.multiprocessors)
    if blocks == 1 or config.persistent:
        busy = mine * (main + ends)
    else:
        busy = mine * max(main, (main + ends) / blocks) + ends
    return device.start_s + max(busy, moved * size / device.memory_bytes_per_s)


def _tiles(rows: int, columns: int, config: GemmConfig) -> int:
    return cdiv(rows, config.block_m) * cdiv(columns, config.block_n)


def _tile_bytes(config: GemmConfig, size: int) -> int:
    """Of both factors in one step of the main loop."""
    return (config.block_m + config.block_n) * config.block_k * size


def _shared_reads(config: GemmConfig, size: int) -> float:
    """Bytes that the matrix instructions of one step read: each 64 rows and its columns, in K."""
    groups, instructions = max(config.warps // 4, 1), max(config.block_m // 64, 1)
    columns = config.block_n * min(instructions / groups, 1.0)
    return instructions * config.block_n / columns * (64 + columns) * config.block_k * size


def _blocks(config: GemmConfig, size: int, device: Device, registers: int | None) -> int:
    """Blocks of this configuration on one multiprocessor at a time."""
    threads = 32 * config.warps
    if registers is None:
        registers = min(255, config.block_m * config.block_n // threads + 64)
    shared = _tile_bytes(config, size) * config.stages + 1024
    found = min(_REGISTERS // (registers * threads), device.shared_bytes // shared)
    return max(found, 1)


def layer_seconds(layer: Layer, plan: GemmPlan, device: Device, top_k: int = 1) -> dict[str, float]:
    """Every kernel of one forward and backward pass, in the order they run; their sum is a layer.

    Products by the plan, everything else by its bytes (docs/kernels.md). Routing and sorting are
    not in it.
    """
    size, rows, tokens = _BYTES, layer.rows, layer.rows // top_k
    hidden, width, pre = layer.hidden, layer.width, layer.pre_width
    tiles = cdiv(rows, ROWS_PER_TILE) + layer.experts - 1

    def moving(moved: float) -> float:
        return device.short_start_s + moved / device.memory_bytes_per_s

    def product(name: Product) -> float:
        return product_seconds(name, layer, getattr(plan, name), device)

    copied = size * (tokens + rows) * hidden
    shares = 4 * (tiles * pre + cdiv(width, 32) * rows)
    bias_shares = 4 * (tiles * hidden + cdiv(hidden, 64) * rows)
    return {
        "gather of x": moving(copied),
        "up": product("up"),
        "down": product("down"),
        "combine": moving(copied),
        "gather of dy": moving(copied),
        "activation_grad": product("activation_grad"),
        "activation gradient": max(
            moving(size * rows * (2 * width + 2 * pre) + shares),
            rows * pre * _BACKWARD_INSTRUCTIONS / _LANES / device.multiprocessors / device.clock_hz,
        ),
        "output bias": moving(size * rows * hidden + bias_shares),
        "sums": moving(shares + bias_shares),
        "weight_grad of w2": product("weight_grad"),
        "gather of x again": moving(copied),
        "weight_grad of w1": product("weight_grad"),
        "input_grad": product("input_grad"),
        "combine of dx": moving(copied),
    }

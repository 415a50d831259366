"""The time model of the kernels beside what was measured: `python -m benchmarks.gpu predict`."""

import dataclasses
import itertools
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import spearmanr

from benchmarks.gpu.program import Fields, read_journal
from benchmarks.gpu.report import table
from benchmarks.gpu.sweep import SHAPES
from emergence_kernels.gpu.defaults import TARGETS, default_plan
from emergence_kernels.gpu.gemm_config import GemmConfig, Product, rows_bucket
from emergence_kernels.gpu.time_model import (
    H100,
    H200,
    Device,
    Layer,
    layer_seconds,
    product_seconds,
)

KERNELS = {
    "gathers and combines": ("gather", "combine"),
    "up projection": ("up_projection",),
    "products with w1 and w2": ("row_product",),
    "weight gradients": ("weight_gradient",),
    "activation gradient": ("activation_gradient",),
    "output bias": ("output_bias",),
    "sums": ("sum", "routing_weight"),
}
"""Names in the tables, and how those of the kernels begin."""
PARTS = {
    "gathers and combines": ("gather", "combine"),
    "up projection": ("up",),
    "products with w1 and w2": ("down", "activation_grad", "input_grad"),
    "weight gradients": ("weight_grad",),
    "activation gradient": ("activation gradient",),
    "output bias": ("output bias",),
    "sums": ("sums",),
}
"""The same, and how those of `layer_seconds` begin."""


@dataclass(frozen=True)
class Sample:
    """One configuration of one product."""

    group: tuple[str, Product]
    """Shape and product."""
    layer: Layer
    config: GemmConfig
    registers: int
    measured: float

    def predicted(self, device: Device) -> float:
        """Seconds by the model."""
        product = self.group[1]
        return product_seconds(product, self.layer, self.config, device, self.registers)


def samples(rows: Sequence[Fields]) -> list[Sample]:
    """What a sweep measured, without kernels that spill or were held to fewer registers."""
    layers = {s.name: Layer(s.rows, s.hidden, s.width, s.experts) for s in SHAPES}
    found = []
    for row in rows:
        if row.get("seconds") and "product" in row and not row.get("spilled"):
            config = _parsed(row["config"])
            if config is not None:
                group = row["shape"], row["product"]
                layer = layers[row["shape"]]
                found.append(Sample(group, layer, config, row["registers"], row["seconds"]))
    return found


def _parsed(text: str) -> GemmConfig | None:
    """The inverse of `describe`."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+) w(\d+) s(\d+)((?: [a-z]+)*)", text)
    if match is None:
        return None
    block_m, block_n, block_k, warps, stages = map(int, match.groups()[:5])
    flags = dict.fromkeys(match[6].split(), True)
    return GemmConfig(block_m, block_n, block_k, warps, stages, **flags)


@dataclass(frozen=True)
class Agreement:
    """How the model does on the configurations of one product and shape."""

    correlation: float
    """Of the ranks of predicted and measured seconds."""
    ratio: float
    """Median of predicted over measured."""
    lowest: float
    highest: float
    chosen: float
    """Measured seconds of the configuration that the model prefers, over those of the fastest."""
    count: int


def agreement(group: Sequence[Sample], device: Device) -> Agreement:
    """The model against the measurements of one group."""
    predicted, measured = [s.predicted(device) for s in group], [s.measured for s in group]
    ratios = [p / m for p, m in zip(predicted, measured, strict=True)]
    chosen = measured[min(range(len(group)), key=predicted.__getitem__)]
    return Agreement(
        float(spearmanr(predicted, measured).statistic),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        chosen / min(measured),
        len(group),
    )


def by_group(found: Sequence[Sample]) -> dict[tuple[str, Product], list[Sample]]:
    """Samples by shape and product, in the order measured."""
    groups: dict[tuple[str, Product], list[Sample]] = {}
    for sample in found:
        groups.setdefault(sample.group, []).append(sample)
    return groups


def predict(source: Path) -> str:
    """Markdown: kernels and whole layers, then products under every configuration of a sweep.

    Raises:
        ValueError: for a file that `run` did not write.
    """
    journal = read_journal(source)
    device = H100 if "H100" in journal["environment"]["device_name"] else H200
    rows = {name: stage["rows"] for name, stage in journal["stages"].items()}
    parts = []
    kernels = [*_kernels(rows.get("taken-apart", []), device)]
    if kernels:
        parts.append(table(("shape", "kernels", "predicted, us", "measured, us", "ratio"), kernels))
    found = samples(rows.get("sweep", []))
    if found:
        head = ("shape", "product", "configurations", "rank correlation", "predicted/measured",
                "from", "to", "preferred/fastest")  # fmt: skip
        cells = []
        for (shape, product), group in by_group(found).items():
            a = agreement(group, device)
            figures = (a.correlation, a.ratio, a.lowest, a.highest, a.chosen)
            cells.append((shape, product, a.count, *(f"{value:.2f}" for value in figures)))
        parts.append(table(head, cells))
    return "\n".join(parts)


def _kernels(rows: Sequence[Fields], device: Device) -> Iterator[tuple[str, ...]]:
    for shape in SHAPES:
        layer = Layer(shape.rows, shape.hidden, shape.width, shape.experts)
        bucket = rows_bucket(shape.rows, shape.experts)
        plan = default_plan(TARGETS["sm_90"], torch.bfloat16, "ieee", bucket, gated=False)
        by_part = layer_seconds(layer, plan, device, shape.top_k)
        named = {"1k": "1024-k1", "16k": "16384-k1"}.get(shape.name, shape.name)
        own = [r for r in rows if r["path" if "path" in r else "what"] == "fused"]
        own = [r for r in own if r["shape"] == named]
        whole = [r for r in own if r.get("phase") == "full" and r.get("graph_s")]
        for name, begins in KERNELS.items():
            measured = sum(r["us"] for r in own if r.get("kernel", "")[1:].startswith(begins))
            predicted = sum(s for part, s in by_part.items() if part.startswith(PARTS[name]))
            if measured:
                yield _line(named, name, 1e6 * predicted, measured)
        for row in whole:
            predicted = 1e6 * sum(by_part.values())
            yield _line(named, "layer, as a graph", predicted, 1e6 * row["graph_s"])


def _line(shape: str, name: str, predicted: float, measured: float) -> tuple[str, ...]:
    ratio = f"{predicted / measured:.2f}"
    return shape, name, f"{predicted:,.0f}", f"{measured:,.0f}", ratio


def fit(source: Path) -> Device:
    """The H200 with the three constants that bring a sweep's predictions nearest to it.

    On a grid, by the mean distance of the logarithms.
    """
    found = samples(read_journal(source)["stages"]["sweep"]["rows"])

    def distance(device: Device) -> float:
        return statistics.fmean(abs(math.log(s.predicted(device) / s.measured)) for s in found)

    grid = itertools.product(
        (9e12, 10e12, 11e12, 12e12, 13e12, 14e12, 16e12),
        (1e-6, 2e-6, 2.5e-6, 3e-6, 3.5e-6, 4e-6, 5e-6),
        (8e-6, 10e-6, 12e-6, 14e-6, 16e-6, 18e-6, 20e-6),
    )
    candidates = [
        dataclasses.replace(H200, cache_bytes_per_s=cache, tile_s=tile, start_s=start)
        for cache, tile, start in grid
    ]
    return min(candidates, key=distance)

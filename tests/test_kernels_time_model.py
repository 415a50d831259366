"""The time model of the kernels: what must hold of any, and the measurements of an H200."""

import dataclasses
import statistics
from itertools import pairwise

import pytest
import torch
from conftest import REPOSITORY
from hypothesis import assume, given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the model is of Triton's kernels, which is not installed")

from benchmarks.gpu.predictions import agreement, by_group, fit, predict, samples
from benchmarks.gpu.program import read_journal
from emergence_kernels.gpu.defaults import TARGETS, default_plan
from emergence_kernels.gpu.gemm_config import PRODUCTS, GemmConfig, rows_bucket
from emergence_kernels.gpu.time_model import (
    H100,
    H200,
    Layer,
    layer_seconds,
    product_seconds,
)

SWEEP = REPOSITORY / "docs" / "results" / "h200" / "second.json"
products = st.sampled_from(PRODUCTS)
layers = st.builds(
    Layer,
    rows=st.integers(1, 70_000),
    hidden=st.sampled_from([64, 256, 768, 1600]),
    width=st.sampled_from([64, 256, 3072]),
    experts=st.sampled_from([1, 4, 8, 64]),
    activation=st.sampled_from(["gelu_tanh", "swiglu"]),
)
configs = st.builds(
    GemmConfig,
    st.sampled_from([64, 128, 256]),
    st.sampled_from([64, 128, 256]),
    st.sampled_from([32, 64]),
    st.sampled_from([4, 8]),
    st.sampled_from([2, 3, 4]),
    persistent=st.booleans(),
)


@given(products, layers, configs)
def test_no_product_beats_the_units_or_the_memory(product, layer, config) -> None:
    seconds = product_seconds(product, layer, config, H200)
    flops = 2 * layer.rows * layer.hidden * layer.width
    peak = H200.multiprocessors * H200.clock_hz * H200.flops_per_clock
    weight = 2 * layer.experts * layer.hidden * layer.width
    assert seconds > flops / peak
    assert seconds > weight / H200.memory_bytes_per_s


@given(products, layers, configs, st.floats(1.0, 3.0))
def test_a_faster_gpu_is_never_slower(product, layer, config, factor) -> None:
    before = product_seconds(product, layer, config, H200)
    for figure in ("clock_hz", "memory_bytes_per_s", "cache_bytes_per_s"):
        faster = dataclasses.replace(H200, **{figure: factor * getattr(H200, figure)})
        assert product_seconds(product, layer, config, faster) <= before * (1 + 1e-12)
    assert product_seconds(product, layer, config, H100) >= before * (1 - 1e-12)


@given(products, layers, configs, st.integers(2, 5))
def test_more_rows_never_take_less(product, layer, config, times) -> None:
    more = dataclasses.replace(layer, rows=times * layer.rows)
    before, after = (product_seconds(product, x, config, H200) for x in (layer, more))
    assert after >= before * (1 - 1e-12)
    # and what they add is at most as much again for each
    assert after <= times * before * (1 + 1e-12) + times * config.block_m * 1e-6


@given(layers)
def test_a_layer_is_its_kernels(layer) -> None:
    assume(layer.rows > 8)
    bucket = rows_bucket(layer.rows, layer.experts)
    gated = layer.activation == "swiglu"
    plan = default_plan(TARGETS["sm_90"], torch.bfloat16, "ieee", bucket, gated=gated)
    parts = layer_seconds(layer, plan, H200)
    assert all(seconds > 0 for seconds in parts.values())
    assert parts["up"] == product_seconds("up", layer, plan.up, H200)
    sizes = [dataclasses.replace(layer, rows=layer.rows * k) for k in (1, 4, 16)]
    totals = [sum(layer_seconds(size, plan, H200).values()) for size in sizes]
    assert all(a <= b for a, b in pairwise(totals))


def test_it_agrees_with_what_an_h200_took() -> None:
    """Over all configurations of a sweep; docs/performance.md has the figures."""
    found = samples(read_journal(SWEEP)["stages"]["sweep"]["rows"])
    assert len(found) > 600
    ratios = [sample.predicted(H200) / sample.measured for sample in found]
    assert statistics.median(ratios) == pytest.approx(1.0, abs=0.05)
    fifth, *_, last = statistics.quantiles(ratios, n=20)
    assert fifth > 0.7
    assert last < 1.3
    groups = [agreement(group, H200) for group in by_group(found).values()]
    assert len(groups) == 20
    assert min(group.correlation for group in groups) > 0.5
    assert statistics.median(group.correlation for group in groups) > 0.72
    # to take what the model prefers costs little, where not every configuration is tried
    assert statistics.median(group.chosen for group in groups) < 1.15
    assert max(group.chosen for group in groups) < 1.65


def test_the_fitted_constants_are_the_fitted_ones() -> None:
    fitted = fit(SWEEP)
    for name in ("cache_bytes_per_s", "tile_s", "start_s"):
        assert getattr(H200, name) == getattr(fitted, name), name


@pytest.mark.parametrize("name", ["second", "last"])
def test_the_document_has_the_tables(name: str) -> None:
    text = (REPOSITORY / "docs" / "performance.md").read_text("utf-8")
    for table in predict(SWEEP.with_name(f"{name}.json")).split("\n\n"):
        if ("correlation" in table) == (name == "second"):
            assert table.strip() in text

"""The cost model of many GPUs: closed forms in its limits, what must hold of any, measurements."""

import csv
import dataclasses
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from moe_emergence import suite as command
from moe_emergence.experiments import estimate, parallel_plan
from moe_emergence.experiments.cluster import Cluster
from moe_emergence.experiments.flops import base_config, training_flops_per_token
from moe_emergence.experiments.model_shape import ModelShape, shape_of
from moe_emergence.experiments.parallel_cost import (
    SKEW,
    LayoutCost,
    group_sizes,
    kernel_seconds,
    layout_cost,
    rank_rows,
)
from moe_emergence.experiments.parallel_plan import (
    compare,
    distinct_shapes,
    fastest,
    pays_from,
    verdict,
)
from moe_emergence.experiments.variants import with_changes
from moe_emergence.presets import demo, get_preset
from moe_emergence.suite.options import RunOptions

H200_STEPS = REPOSITORY / "docs" / "results" / "h200" / "third.json"
SMALL = ModelShape(
    hidden=8, width=16, experts=32, top_k=2, activation="gelu_tanh", mixture_layers=3,
    dense_layers=2, tokens=64, passes=2, attention_weights=256, score_flops=100, vocabulary=50,
    tied=True,
)  # fmt: skip

shapes = st.builds(
    ModelShape,
    hidden=st.sampled_from([8, 96]),
    width=st.sampled_from([16, 200]),
    experts=st.sampled_from([8, 24, 64]),
    top_k=st.integers(1, 8),
    activation=st.sampled_from(["gelu_tanh", "swiglu"]),
    mixture_layers=st.integers(1, 4),
    dense_layers=st.integers(0, 4),
    tokens=st.integers(1, 3000),
    passes=st.integers(1, 4),
    attention_weights=st.integers(0, 40_000),
    score_flops=st.integers(0, 10_000),
    vocabulary=st.integers(1, 5000),
    tied=st.booleans(),
)
clusters = st.builds(
    lambda nodes, per_node: Cluster(nodes * per_node, per_node),
    st.integers(1, 4),
    st.sampled_from([1, 2, 3, 4, 8]),
)


def full_size() -> ModelShape:
    """The predecessor's mixture of GPT-2 small, in batches of 16 x 512 tokens."""
    changes = {
        "model.base": "scratch", "optim.pretrain_steps": 1, "optim.balance_scope": "global",
        "optim.batch_size": 4,
    }  # fmt: skip
    return shape_of(with_changes(get_preset("moe-main"), changes, "here"))


def busy(shape: ModelShape, rows: int, experts: int, top_k: int) -> tuple[float, float]:
    """Experts that take as long as they have rows."""
    return 1e-6 * rows, 2e-6 * rows


def idle(shape: ModelShape, rows: int, experts: int, top_k: int) -> tuple[float, float]:
    """Experts that take no time."""
    return 0.0, 0.0


def immediate(cluster: Cluster) -> Cluster:
    """With nothing that takes time but links' bytes."""
    return replace(
        cluster, latency_s=0.0, sync_s=0.0, update_s=0.0, dense_flops_per_s=math.inf,
        memory_bytes_per_s=math.inf,
    )  # fmt: skip


@given(shapes, clusters)
def test_without_links_to_wait_for_a_step_is_its_computing(
    shape: ModelShape, cluster: Cluster
) -> None:
    fast = replace(
        cluster, nvlink_bytes_per_s=math.inf, network_bytes_per_s=math.inf, latency_s=0.0,
        sync_s=0.0, memory_bytes_per_s=math.inf,
    )  # fmt: skip
    rows = shape.tokens * shape.top_k
    alone = layout_cost(shape, fast, 1, expert_seconds=busy)
    assert alone.load == 1.0
    for ep in group_sizes(shape, fast):
        found = layout_cost(shape, fast, ep, expert_seconds=busy)
        assert found.step_s == found.compute_s
        # layouts differ by the rows of the fullest rank, and by nothing else
        more = 3e-6 * (math.ceil(found.load * rows) - rows) * shape.passes * shape.mixture_layers
        assert found.compute_s - alone.compute_s == pytest.approx(more, rel=1e-6, abs=1e-12)


@given(shapes, clusters, st.sampled_from(["nvlink", "network"]))
def test_without_computing_a_step_is_bytes_over_bandwidth(
    shape: ModelShape, cluster: Cluster, kind: str
) -> None:
    """Counted rank by rank and message by message, over one kind of links at a time."""
    bandwidth, other = 1e9, "network" if kind == "nvlink" else "nvlink"
    speeds = {f"{kind}_bytes_per_s": bandwidth, f"{other}_bytes_per_s": math.inf}
    links, gpus = replace(immediate(cluster), **speeds), cluster.gpus

    def same_node(a: int, b: int) -> bool:
        return a // cluster.gpus_per_node == b // cluster.gpus_per_node

    def gathered(size: float, group: list[int]) -> float:
        """What rank 0 gets: shards from elsewhere come into its node once, by all members there."""
        here = sum(same_node(0, rank) for rank in group)
        from_outside = size / len(group) * (len(group) - here) / here
        whole = size - size / len(group)
        return from_outside if kind == "network" else whole - from_outside

    for ep in group_sizes(shape, links):
        found = layout_cost(shape, links, ep, expert_seconds=idle)
        everyone, replicas = list(range(gpus)), list(range(0, gpus, ep))
        travels = [same_node(0, rank) == (kind == "nvlink") for rank in range(1, ep)]
        rows = shape.passes * shape.mixture_layers * found.load * shape.tokens * shape.top_k
        sent = 4 * rows * 2 * shape.hidden * sum(travels) / ep
        own = shape.weights - shape.mixture_layers * shape.experts * shape.mlp_weights
        experts = shape.mixture_layers * shape.experts // ep * shape.mlp_weights
        # 4 bytes in all-gathers for both directions, and in the reduce-scatter
        moved = shape.passes * 12 * (gathered(own, everyone) + gathered(experts, replicas))
        assert found.all_to_all_s == pytest.approx(sent / bandwidth, rel=1e-9)
        assert found.weights_s == pytest.approx(moved / bandwidth, rel=1e-9, abs=1e-15)
        assert found.step_s == pytest.approx((sent + moved) / bandwidth, rel=1e-9, abs=1e-15)


def test_links_of_both_kinds_work_side_by_side() -> None:
    cluster = replace(Cluster(16), nvlink_bytes_per_s=5.0, network_bytes_per_s=1.0, latency_s=0.25)
    assert cluster.exchange_s(16.0, 16, 8) == 0.25 + max(7 / 5, 8 / 1)
    assert cluster.gather_s(16.0, 16, 8) == 0.25 + max(14 / 5, 1 / 1)
    assert cluster.exchange_s(16.0, 1, 1) == cluster.gather_s(16.0, 1, 1) == 0.0


@given(clusters, st.floats(0.0, 2.0), st.sampled_from([24, 48]), st.integers(1, 500))
def test_every_row_that_is_sent_arrives(
    cluster: Cluster, skew: float, experts: int, rows: int
) -> None:
    for ep in (size for size in cluster.groups if experts % size == 0):
        got = rank_rows(experts, ep, cluster.gpus, rows, skew)
        assert got.shape[1:] == (cluster.gpus // ep, ep)
        assert (got.sum(axis=2) == ep * rows).all()
        np.testing.assert_array_equal(got, rank_rows(experts, ep, cluster.gpus, rows, skew))


def test_the_fullest_rank_is_that_of_the_distribution() -> None:
    # a rank an expert and many rows: the most popular one decides
    popularity = np.arange(1, 33) ** -0.5
    found = rank_rows(32, 32, 32, 10**6, 0.5).max(axis=(1, 2)).mean() / 10**6
    assert found == pytest.approx(32 * popularity[0] / popularity.sum(), rel=0.01)
    # equal chances: of two ranks one has the mean absolute deviation more
    rows = 10_000
    found = rank_rows(2, 2, 2 * 100, rows, 0.0).max(axis=2).mean() / rows
    assert found - 1 == pytest.approx(math.sqrt(rows / 2 * 2 / math.pi) / rows, rel=0.1)
    # many experts a rank even out
    loads = [layout_cost(replace(SMALL, experts=e), Cluster(8), 8).load for e in (8, 64, 512, 4096)]
    assert loads == sorted(loads, reverse=True)


@given(shapes, clusters)
def test_experts_of_one_rank_each_are_never_gathered(shape: ModelShape, cluster: Cluster) -> None:
    if cluster.gpus not in group_sizes(shape, cluster):
        return
    wider = replace(shape, width=3 * shape.width, dense_layers=0)
    narrow = replace(shape, dense_layers=0)
    costs = [layout_cost(s, cluster, cluster.gpus, expert_seconds=idle) for s in (narrow, wider)]
    assert costs[0].weights_s == costs[1].weights_s


@given(
    shapes,
    clusters,
    st.sampled_from(
        ["nvlink_bytes_per_s", "network_bytes_per_s", "dense_flops_per_s", "memory_bytes_per_s"]
    ),
    st.floats(1.0, 100.0),
)
def test_faster_parts_never_make_a_slower_step(
    shape: ModelShape, cluster: Cluster, rate: str, factor: float
) -> None:
    faster = replace(cluster, **{rate: factor * getattr(cluster, rate)})
    for ep in group_sizes(shape, cluster):
        before, after = (layout_cost(shape, c, ep, expert_seconds=busy) for c in (cluster, faster))
        assert after.step_s <= before.step_s * (1 + 1e-12)


@given(shapes, clusters)
def test_a_step_is_its_parts(shape: ModelShape, cluster: Cluster) -> None:
    for ep in group_sizes(shape, cluster):
        found = layout_cost(shape, cluster, ep, expert_seconds=busy)
        assert found.ep == ep
        assert found.load >= 1.0
        together = found.compute_s + found.all_to_all_s + found.weights_s
        assert max(found.compute_s, found.weights_s) + found.all_to_all_s <= found.step_s + 1e-12
        assert found.step_s <= together * (1 + 1e-12)
        assert (found.all_to_all_s > 0) == (ep > 1)
        assert found.memory_bytes > 16 * shape.weights / cluster.gpus


def test_sharing_experts_waits_for_sizes_and_orders_rows_twice() -> None:
    quick = replace(
        immediate(Cluster(8)), nvlink_bytes_per_s=math.inf, latency_s=1.0, sync_s=100.0,
        memory_bytes_per_s=1.0,
    )  # fmt: skip
    asked: list[tuple[int, int, int]] = []

    def record(shape: ModelShape, rows: int, experts: int, top_k: int) -> tuple[float, float]:
        asked.append((rows, experts, top_k))
        return 0.0, 0.0

    alone, shared = (layout_cost(SMALL, quick, ep, expert_seconds=record) for ep in (1, 8))
    # two all-to-alls each way, and one of the sizes
    assert shared.all_to_all_s == SMALL.passes * SMALL.mixture_layers * (5 * 1.0 + 100.0)
    tokens, rows = SMALL.tokens, SMALL.tokens * SMALL.top_k
    # read and written in 2 bytes before the rows leave and after they are back, each way
    ordered = 2 * 2 * 2 * SMALL.hidden * (tokens + rows) * SMALL.passes * SMALL.mixture_layers
    assert shared.compute_s - alone.compute_s == ordered
    # rows of one token arrive one by one
    assert asked == [(rows, 32, 2), (math.ceil(rows * shared.load), 4, 1)]


def test_memory_is_states_gathered_blocks_and_activations() -> None:
    def kept(ep: int, gpus: int, **changes: int) -> float:
        shape = replace(SMALL, **changes)
        return layout_cost(shape, Cluster(gpus), ep, expert_seconds=idle).memory_bytes

    row = 2 * (8 + 16 + 16)
    own = 5 * 16 * 8 + 2 * row + 3 * 2 * row + 4 * 50
    assert kept(1, 1) == 16 * SMALL.weights + 64 * own
    # a mixture block with all its experts, twice, their 16-bit copy, and its gradients
    block = 256 + 32 * 2 * 8 * 16
    assert kept(1, 8) == 2 * SMALL.weights + 14 * block + 64 * own
    assert kept(1, 1, top_k=3) - kept(1, 1) == 64 * 3 * row
    load = layout_cost(SMALL, Cluster(8), 8, expert_seconds=idle).load
    more = 3 * 2 * ((load - 1) * row + 4 * 8)
    shared = 2 * SMALL.weights + 14 * (256 + 4 * 2 * 8 * 16) + 64 * (own + more)
    assert kept(8, 8) == pytest.approx(shared)


def test_weights_hide_behind_the_computing_of_their_own_layer() -> None:
    cluster = Cluster(8)
    found = layout_cost(SMALL, cluster, 1, expert_seconds=lambda *_: (1.0, 2.0))
    dense, _, mixture, *_ = found.layers
    assert mixture.waiting_s == 0.0
    # a mixture's long computing hides nothing of the others' traffic
    assert dense.waiting_s == dense.weights_s - dense.compute_s > 0


@pytest.mark.parametrize("frozen", [0, 1])
def test_shapes_count_what_flops_and_models_count(frozen: int) -> None:
    changes = {"model.router": "learned", "model.frozen_layers": frozen}
    config = with_changes(demo(), changes, "here")
    shape = shape_of(config)
    cluster = replace(immediate(Cluster(1)), dense_flops_per_s=1.0)

    def products(shape: ModelShape, rows: int, *_: int) -> tuple[float, float]:
        flops = 2.0 * rows * shape.mlp_weights
        return flops, 2 * flops

    found = layout_cost(shape, cluster, 1, expert_seconds=products)
    # a tied head that is frozen has no gradient of its weights, which the model does not know
    head = shape.vocabulary * shape.hidden * 2 * frozen
    flops = shape.tokens * shape.passes * (training_flops_per_token(config) + head)
    assert found.step_s == pytest.approx(flops)
    dense = AutoModelForCausalLM.from_config(base_config(config))
    whole = replace(shape, mixture_layers=0, dense_layers=config.model.n_layer)
    # positions, norms and biases are left out
    assert whole.weights == pytest.approx(dense.num_parameters(), rel=0.02)
    untied = replace(shape, tied=False)
    assert untied.weights - shape.weights == shape.vocabulary * shape.hidden
    micro = with_changes(config, {"optim.balance_scope": "micro", "optim.grad_accum_steps": 4}, "")
    assert shape_of(micro) == replace(shape, passes=4)


def test_one_gpu_takes_what_an_h200_took() -> None:
    pytest.importorskip("triton", reason="the experts' time is that of Triton's kernels")
    rows = json.loads(H200_STEPS.read_text())["stages"]["training"]["rows"]
    measured = {(row["group"], row["contestant"]): row for row in rows}
    mixture = full_size()
    dense = replace(mixture, mixture_layers=0, dense_layers=12)
    for shape, group, contestant in (
        (dense, "gpt2-small-batch16/bf16", "dense"),
        (mixture, "gpt2-small-batch16/bf16", "fused"),
        (replace(mixture, tokens=4096), "gpt2-small/bf16", "fused"),
    ):
        found = layout_cost(shape, Cluster(1), 1)
        seconds = measured[group, f"{contestant}-graph"]["median_s"]
        assert found.step_s == pytest.approx(seconds, rel=0.05)
        peak = measured[group, contestant]["peak_bytes"]
        assert found.memory_bytes == pytest.approx(peak, rel=0.05)


def test_the_assumed_skew_is_that_of_trained_routers() -> None:
    fullest = 8 / sum(e**-SKEW for e in range(1, 9))
    for name in ("demo", "ablations"):
        path = REPOSITORY / "docs" / "experiments" / name / "tables" / "largest_share.csv"
        with path.open() as lines:
            rows = [row for row in csv.DictReader(lines) if row["variant"] == "moe"]
        last = max(int(row["step"]) for row in rows)
        shares = [float(row["largest_share"]) for row in rows if int(row["step"]) == last]
        assert 8 * sum(shares) / len(shares) == pytest.approx(fullest, rel=0.03)


@pytest.fixture
def large() -> ModelShape:
    pytest.importorskip("triton", reason="the experts' time is that of Triton's kernels")
    return replace(full_size(), tokens=4096)


def test_thousands_of_experts_on_a_thousand_gpus_are_quick(large: ModelShape) -> None:
    cluster, shape = Cluster(1024), replace(large, experts=8192)
    kernel_seconds(shape, 8, 8, 1)
    began = time.process_time()
    assert "needed" in verdict(shape, cluster, compare(shape, cluster))
    assert time.process_time() - began < 2


def test_verdicts_say_what_the_layouts_say(large: ModelShape) -> None:
    node, many = Cluster(8), Cluster(64)

    def said(experts: int, cluster: Cluster, ep: int | None = None) -> str:
        shape = replace(large, experts=experts)
        return verdict(shape, cluster, compare(shape, cluster, ep), ep)

    assert said(8, node, 8).startswith("Expert parallelism makes no difference")
    assert said(8, node).startswith("Expert parallelism pays: ep = 2 is 1.0")
    assert said(4, node).startswith("Expert parallelism does not pay: with ep = 2")
    assert said(128, many).startswith("Expert parallelism pays: ep = 64 is 3.9")
    assert said(128, many, 16).startswith("Expert parallelism pays: ep = 16 is")
    assert said(4096, many).startswith("Expert parallelism is needed: without it a GPU takes")
    assert said(10**5, node) == "No layout fits into 141 GB a GPU: give more --gpus."
    assert said(3, node) == "8 GPUs cannot share 3 experts in whole ones."
    first = pays_from(large, many)
    assert first is not None
    for experts in (first // 2, first, 2 * first):
        shape = replace(large, experts=experts)
        layouts = compare(shape, many)
        best = fastest(layouts, many)
        assert best is not None
        assert (layouts[0].step_s / best.step_s >= 1.05) == (experts >= first)
        assert f"from {first} experts on" in said(experts, many)
    # 64 experts and more need more than 8 GPUs
    assert pays_from(large, node) == 8
    slow = replace(many, latency_s=1.0, memory_bytes=math.inf)
    assert pays_from(large, slow) is None


def test_it_pays_from_where_it_goes_on_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    without = layout_cost(SMALL, Cluster(8), 1, expert_seconds=idle)

    def layouts(shape: ModelShape, cluster: Cluster, ep: int | None) -> list[LayoutCost]:
        update_s = 1e-9 if shape.experts == 8 or shape.experts >= 32 else 1.0
        return [without, replace(without, ep=8, layers=(), update_s=update_s)]

    monkeypatch.setattr(parallel_plan, "compare", layouts)
    assert pays_from(SMALL, Cluster(8)) == 32


def test_layouts_are_compared_by_one_number_at_a_time(large: ModelShape) -> None:
    assert [found.ep for found in compare(large, Cluster(8))] == [1, 2, 4, 8]
    assert [found.ep for found in compare(large, Cluster(8), 4)] == [1, 4]
    # no group lies across two nodes without filling them
    assert Cluster(24).groups == (1, 2, 4, 8, 24)
    with pytest.raises(ValueError, match=r"--ep 16: 8 experts can be shared by one of 1 2 4 8"):
        compare(large, Cluster(16), 16)


def test_runs_of_one_shape_are_one_table() -> None:
    moe = demo()
    configs = {
        "dense": with_changes(moe, {"model.moe_layers": []}, ""),
        "moe": moe,
        "hash": with_changes(moe, {"model.router": "hash", "model.router_init": "random"}, ""),
        "top2": with_changes(moe, {"model.top_k": 2}, ""),
    }
    found = distinct_shapes(configs)
    assert list(found.values()) == [["moe", "hash"], ["top2"]]
    configs["fp32"] = with_changes(moe, {"optim.precision": "fp32"}, "")
    with pytest.raises(ValueError, match="--precision fp32: --gpus needs bf16 for fp32"):
        distinct_shapes(configs)


def test_plan_prints_predictions_in_place_of_measurements(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="the experts' time is that of Triton's kernels")

    def refuse(*_: object) -> float:
        raise AssertionError("a step was timed")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "time_step", refuse)
    assert command.main(["plan", "demo", "--gpus", "8"]) == 0
    said = capsys.readouterr().out
    for text in ("moe, no-lb, frozen, hash: 8 experts", "top2: 8 experts", "experts on."):
        assert text in said
    assert said.count("Predicted, unmeasured") == 2
    assert command.main(["plan", "demo", "--gpus", "8", "--only", "dense"]) == 0
    assert "No variant has mixture layers." in capsys.readouterr().out
    with pytest.raises(AssertionError, match="a step was timed"):
        command.main(["plan", "demo"])


def test_without_triton_the_flag_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "emergence_kernels.gpu.defaults", None)
    with pytest.raises(ValueError, match="--gpus: the kernels' time model needs Triton"):
        command.main(["plan", "demo", "--gpus", "8", "--only", "moe"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpus 0", "--gpus 0: give at least 1"),
        ("--gpus 12", "--gpus 12: give whole nodes: a multiple of --gpus-per-node (8), or fewer"),
        ("--gpus 8 --gpus-per-node 0", "--gpus-per-node 0: give at least 1"),
        ("--gpus 8 --ep 3", "--ep 3: give one of 1 2 4 8, which share out --gpus (8)"),
        ("--ep 2", "--ep 2: give one of 1, which share out --gpus (1)"),
        ("--gpus 8 --price-per-hour 2", "--price-per-hour 2.0: is for this machine; leave out"),
        ("--gpus 16 --ep 16", "--ep 16: 8 experts can be shared by one of 1 2 4 8 ranks"),
    ],
)
def test_wrong_flags_are_one_line(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        command.main(["plan", "demo", *flags.split()])
    assert message in str(caught.value)


def test_running_a_suite_has_no_flags_of_predictions() -> None:
    fields = {field.name for field in dataclasses.fields(RunOptions)}
    assert not fields & {"gpus", "ep", "gpus_per_node"}

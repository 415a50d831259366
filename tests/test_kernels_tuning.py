"""Tuning: what is measured, what may be chosen, and what is kept."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import KERNEL_DEVICE

from emergence_kernels.batches import BatchPlan
from emergence_kernels.gpu.gemm_config import PRODUCTS, GemmConfig, GemmPlan
from moe_emergence.moe import Experts, MoELayer, get_dispatcher
from moe_emergence.moe.autotune import autotune
from moe_emergence.moe.dispatch import AutoDispatcher
from moe_emergence.moe.fused import FusedDispatcher
from moe_emergence.moe.tuning import (
    TuningEntry,
    TuningKey,
    TuningTable,
    load_table,
    save_table,
    table_path,
)

pytestmark = pytest.mark.slow

SMALL = GemmConfig(16, 16, 16, warps=4, stages=1)
PLAN = GemmPlan(SMALL, SMALL, SMALL, SMALL, SMALL)


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch):
    """The module, with few and small configurations to try."""
    pytest.importorskip("triton")
    from emergence_kernels.gpu import tuning

    few = [SMALL, GemmConfig(32, 16, 16, warps=4, stages=1)]
    monkeypatch.setattr(tuning, "candidates", lambda *_, **__: few)
    monkeypatch.setattr(tuning, "default_plan", lambda *_, **__: PLAN_WITH_DEFAULTS)
    return tuning


DEFAULT = GemmConfig(16, 32, 16, warps=4, stages=1)
PLAN_WITH_DEFAULTS = GemmPlan(DEFAULT, DEFAULT, DEFAULT, DEFAULT, DEFAULT)


def shape(tuning, dtype: torch.dtype = torch.float32, activation: str = "gelu_tanh"):
    return tuning.MLPShape(20, 16, 24, 3, 2, activation, dtype)


class Stopwatch:
    """Runs what it measures and says the times it was given, one after another."""

    def __init__(self, *times: float) -> None:
        self.times = list(times)

    def __call__(self, run) -> float:
        run()
        return self.times.pop(0)


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_the_fastest_configuration_of_every_product_is_chosen(tuning, activation) -> None:
    # default, then the two candidates, for each of the five products
    stopwatch = Stopwatch(*[3.0, 1.0, 2.0] * 2, *[1.0, 3.0, 2.0] * 2, *[3.0, 2.0, 1.0])
    tuned = list(
        tuning.tune(shape(tuning, activation=activation), torch.device(KERNEL_DEVICE), stopwatch)
    )
    assert [t.product for t in tuned] == list(PRODUCTS)
    assert [t.config for t in tuned] == [
        SMALL,
        SMALL,
        DEFAULT,
        DEFAULT,
        GemmConfig(32, 16, 16, 4, 1),
    ]
    assert [t.milliseconds for t in tuned] == [1.0] * 5
    assert [t.default_milliseconds for t in tuned] == [3.0, 3.0, 1.0, 1.0, 3.0]
    plan = tuning.plan_of(tuned)
    assert plan.up == SMALL
    assert plan.weight_grad.block_m == 32


def test_a_configuration_that_computes_something_else_is_never_chosen(
    tuning, monkeypatch, caplog
) -> None:
    row_product = tuning.row_product

    def wrong_for_small(*args, **kwargs):
        y = row_product(*args, **kwargs)
        return y * 1.001 if SMALL in args else y

    monkeypatch.setattr(tuning, "row_product", wrong_for_small)
    with caplog.at_level(logging.WARNING):
        tuned = list(tuning.tune(shape(tuning), torch.device(KERNEL_DEVICE), lambda run: 1.0))
    assert all(t.config == DEFAULT for t in tuned)
    refused = [
        r.getMessage() for r in caplog.records if "computes something else" in r.getMessage()
    ]
    assert [message.split()[0] for message in refused] == [
        "down",
        "activation_grad",
        "input_grad",
    ]


def test_a_nan_is_something_else(tuning, monkeypatch) -> None:
    weight_gradient = tuning.weight_gradient

    def nan_for_small(*args, **kwargs):
        dw = weight_gradient(*args, **kwargs)
        return dw * float("nan") if SMALL in args else dw

    monkeypatch.setattr(tuning, "weight_gradient", nan_for_small)
    times = iter([5.0, 1.0, 2.0] * 4 + [5.0, 2.0])
    tuned = list(tuning.tune(shape(tuning), torch.device(KERNEL_DEVICE), lambda run: next(times)))
    assert tuned[-1].config == GemmConfig(32, 16, 16, 4, 1)


@pytest.mark.parametrize("launch_fails", [False, True])
def test_a_configuration_that_does_not_run_is_passed_over(
    tuning, monkeypatch, launch_fails
) -> None:
    up_projection = tuning.up_projection

    def too_big_for_small(*args, **kwargs):
        if SMALL in args:
            if launch_fails:
                raise RuntimeError("Triton Error [CUDA]: invalid argument")
            raise tuning.OutOfResources(300_000, 232_448, "shared memory")
        return up_projection(*args, **kwargs)

    monkeypatch.setattr(tuning, "up_projection", too_big_for_small)
    monkeypatch.setattr(tuning, "_compile", lambda *_: None)  # it is launches that fail
    times = iter([5.0, 2.0] + [1.0, 2.0, 3.0] * 4)
    tuned = list(tuning.tune(shape(tuning), torch.device(KERNEL_DEVICE), lambda run: next(times)))
    assert tuned[0].config == GemmConfig(32, 16, 16, 4, 1)


# the table --------------------------------------------------------------------------------------


def entry(dispatch: str = "fused") -> TuningEntry:
    return TuningEntry(dispatch, PLAN.encoded, {"fused": 1.0, "sequential": 2.0})


def test_a_table_survives_the_disk(tmp_path: Path) -> None:
    experts = Experts(4, 8, 16)
    x_TH = torch.zeros(10, 8)
    table = TuningTable({TuningKey.of(x_TH, 2, experts): entry()})
    path = tmp_path / "tuning" / "device.json"
    save_table(table, path)
    assert load_table(path) == table
    assert load_table(path).plan(x_TH, 2, experts) == PLAN
    assert [p.name for p in path.parent.iterdir()] == ["device.json"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[{}]", '{"a": 1}', '[{"key": {}, "entry": {}}]', "PLAN"],
    ids=["empty", "cut-off", "no-key", "no-list", "other-fields", "bad-plan"],
)
def test_a_broken_table_is_reported_and_ignored(tmp_path: Path, caplog, content) -> None:
    path = tmp_path / "table.json"
    if content == "PLAN":
        key = TuningKey.of(torch.zeros(10, 8), 2, Experts(4, 8, 16))
        bad = {"dispatch": "fused", "plan": '{"up": {"block_m": 1}}', "milliseconds": {}}
        content = json.dumps([{"key": vars(key), "entry": bad}])
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert load_table(path) == TuningTable({})
    assert "table.json" in caplog.text


def test_no_table_is_an_empty_one(tmp_path: Path) -> None:
    assert load_table(tmp_path / "none.json") == TuningTable({})


def test_a_measurement_holds_for_its_bucket_dtype_and_shape_only() -> None:
    experts = Experts(4, 8, 16)
    table = TuningTable({TuningKey.of(torch.zeros(100, 8), 1, experts): entry()})
    assert table.find(torch.zeros(128, 8), 1, experts) is not None  # 25 and 32 rows per expert
    assert table.find(torch.zeros(129, 8), 1, experts) is None
    assert table.find(torch.zeros(50, 8), 2, experts) is None  # as many rows, another top-k
    assert table.find(torch.zeros(100, 8, dtype=torch.bfloat16), 1, experts) is None
    assert table.find(torch.zeros(100, 8), 1, Experts(4, 8, 24)) is None
    assert table.find(torch.zeros(100, 8), 1, Experts(4, 8, 16, "swiglu")) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert table.find(torch.zeros(100, 8), 1, experts) is None


def test_auto_takes_the_path_that_was_fastest(monkeypatch) -> None:
    layer = MoELayer(8, 16, 4, 1)
    x_TH = torch.randn(100, 8)
    table = TuningTable({TuningKey.of(x_TH, 1, layer.experts): entry("sequential")})
    auto = AutoDispatcher(table)
    called = []
    for name, path in auto.paths.items():

        def spy(*args, name=name, path=path):
            called.append(name)
            return path(*args)

        auto.paths[name] = spy
    layer.experts.dispatcher = auto
    layer(x_TH)
    layer(x_TH[:10])
    assert called == ["sequential", "fused"]


def test_the_fused_path_passes_its_plan_on(monkeypatch) -> None:
    from moe_emergence.moe import fused

    plans = []
    expert_mlp = fused.expert_mlp

    def spy(*args):
        plans.append(args[-1])
        return expert_mlp(*args[:-1])  # a plan of the kernels', which a CPU refuses

    monkeypatch.setattr(fused, "expert_mlp", spy)
    layer = MoELayer(8, 16, 4, 1)
    x_TH = torch.randn(100, 8)
    table = TuningTable({TuningKey.of(x_TH, 1, layer.experts): entry()})
    for dispatcher in (FusedDispatcher(table), FusedDispatcher(), get_dispatcher("fused", table)):
        layer.experts.dispatcher = dispatcher
        layer(x_TH)
    assert plans == [PLAN, None, PLAN]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cpu_measures_cuts_and_paths_once(tmp_path: Path, monkeypatch, dtype) -> None:
    """The fastest of each, in a file that later runs find; and computed is the same."""
    measured = []

    def milliseconds(step) -> float:
        step()
        measured.append(step)
        return {4: 1.0, 16: 3.0, 17: 2.0}.get(len(measured), 5.0)

    monkeypatch.setattr("moe_emergence.moe.autotune._milliseconds", milliseconds)
    layer = MoELayer(16, 16, 4, 2).to(dtype)
    table = autotune(layer.experts, 24, 2, dtype, tmp_path)
    assert len(measured) == 5 * 3 + 3
    (found,) = table.entries.values()
    assert found.milliseconds == {"fused": 3.0, "grouped": 2.0, "sequential": 5.0}
    assert found.dispatch == "grouped"
    plan = BatchPlan(1e6, 32 * 1024 * torch.get_num_threads())
    x_TH = torch.randn(24, 16, dtype=dtype)
    assert table.plan(x_TH, 2, layer.experts) == plan
    assert autotune(layer.experts, 24, 2, dtype, tmp_path) == table
    assert len(measured) == 5 * 3 + 3
    assert load_table(table_path(tmp_path, x_TH.device)) == table
    plain, _ = layer(x_TH)
    layer.experts.dispatcher = FusedDispatcher(table)
    torch.testing.assert_close(layer(x_TH)[0], plain)


def test_a_run_on_a_cpu_takes_what_was_measured(tiny_config, monkeypatch) -> None:
    from moe_emergence.training.experiment import run_experiment

    monkeypatch.setattr("moe_emergence.moe.autotune._milliseconds", lambda step: 1.0)
    run_experiment(replace(tiny_config, autotune=True, stop_after=1))
    (path,) = Path(tiny_config.data.cache_dir, "tuning").iterdir()
    assert len(load_table(path).entries) == 1
    path.unlink()

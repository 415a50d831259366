"""Measuring a layer's paths on this machine, so that later runs of that shape take the fastest.

Letters: T tokens, H model width, F expert width, E experts, K experts per token.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch.utils.benchmark import Timer

from emergence_kernels.batches import BatchPlan
from moe_emergence.moe.dispatch import Dispatcher
from moe_emergence.moe.experts import Experts
from moe_emergence.moe.fused import FusedDispatcher
from moe_emergence.moe.grouped import GroupedDispatcher
from moe_emergence.moe.routing import TopKRouter
from moe_emergence.moe.sequential import SequentialDispatcher
from moe_emergence.moe.tuning import (
    TuningEntry,
    TuningKey,
    TuningTable,
    load_table,
    save_table,
    table_path,
)

logger = logging.getLogger(__name__)


def autotune(
    experts: Experts, num_tokens: int, top_k: int, dtype: torch.dtype, cache_dir: Path
) -> TuningTable:
    """Measure the fused path's cuts and the paths for `num_tokens` tokens through `experts`.

    A shape that the table in `cache_dir` has already is not measured again. Works on a copy of the
    experts in `dtype`, on their device, and returns the whole table.
    """
    device = experts.w1.device
    path = table_path(cache_dir, device)
    table = load_table(path)
    copy = Experts(
        experts.num_experts, experts.w1.shape[1], experts.w2.shape[1], experts.activation
    ).to(device, dtype)
    x_TH = torch.randn(num_tokens, experts.w1.shape[1], device=device, dtype=dtype)
    key = TuningKey.of(x_TH, top_k, copy)
    if key in table.entries:
        return table
    logger.info("measuring paths for %s (kept in %s)", key, path)
    measure = measure_on_cpu if device.type == "cpu" else measure_on_gpu
    entry = measure(copy, x_TH.requires_grad_(), top_k)
    for name, milliseconds in entry.milliseconds.items():
        logger.info("%s: %.3f ms forward and backward", name, milliseconds)
    # read again: another run may have written its own shape meanwhile
    table = TuningTable({**load_table(path).entries, key: entry})
    save_table(table, path)
    return table


def measure_on_gpu(experts: Experts, x_TH: torch.Tensor, top_k: int) -> TuningEntry:
    """The fastest configurations and path for one batch `x_TH` (T, H) with random routing."""
    from triton.testing import do_bench

    from emergence_kernels.gpu.tuning import MLPShape, plan_of, tune

    num_experts, width, hidden = experts.w2.shape
    shape = MLPShape(len(x_TH), hidden, width, num_experts, top_k, experts.activation, x_TH.dtype)
    tuned = list(tune(shape, x_TH.device))
    for found in tuned:
        logger.info(
            "%s: %.3f ms, default %.3f ms: %s",
            found.product, found.milliseconds, found.default_milliseconds, found.config,
        )  # fmt: skip
    plan = plan_of(tuned).encoded
    paths = {"fused": _cut_by(plan, x_TH, top_k, experts), **_OTHERS}
    times = time_paths(paths, experts, x_TH, top_k, do_bench)
    return TuningEntry(min(times, key=times.__getitem__), plan, times)


_OTHERS: Mapping[str, Dispatcher] = MappingProxyType(
    {"grouped": GroupedDispatcher(), "sequential": SequentialDispatcher()}
)


def measure_on_cpu(experts: Experts, x_TH: torch.Tensor, top_k: int) -> TuningEntry:
    """The fastest cut into batches and path for one batch `x_TH` (T, H) with random routing."""
    threads = torch.get_num_threads()
    plans = [BatchPlan(cost, size * threads) for cost in _COSTS for size in _SIZES]
    cuts = {plan.encoded: _cut_by(plan.encoded, x_TH, top_k, experts) for plan in plans}
    found = time_paths(cuts, experts, x_TH, top_k, _milliseconds)
    fastest = min(found, key=found.__getitem__)
    times = time_paths({"fused": cuts[fastest], **_OTHERS}, experts, x_TH, top_k, _milliseconds)
    return TuningEntry(min(times, key=times.__getitem__), fastest, times)


_COSTS = (0.0, 1e6, 4e6, 9e6, 4e7)
_SIZES = (32 * 1024, 128 * 1024, 512 * 1024)
"""Of `BatchPlan`: FLOPs, and elements a thread."""


def _cut_by(plan: str, x_TH: torch.Tensor, top_k: int, experts: Experts) -> Dispatcher:
    key = TuningKey.of(x_TH, top_k, experts)
    return FusedDispatcher(TuningTable({key: TuningEntry("fused", plan, {})}))


def _milliseconds(step: Callable[[], object]) -> float:
    """Median over a quarter of a second, and at least three steps."""
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    step()
    return 1e3 * float(timer.blocked_autorange(min_run_time=0.25).median)


def time_paths(
    paths: Mapping[str, Dispatcher],
    experts: Experts,
    x_TH: torch.Tensor,
    top_k: int,
    measure: Callable[[Callable[[], object]], float],
) -> dict[str, float]:
    """Milliseconds of a forward and backward pass through every path that takes the shape."""
    router = TopKRouter(x_TH.shape[1], experts.num_experts, top_k).to(x_TH.device)
    with torch.no_grad():
        decision = router(x_TH)
    chosen, weights = decision.topk_experts, decision.topk_weights
    dy_TH = torch.randn_like(x_TH)
    leaves = [x_TH, *experts.parameters()]
    times = {}
    for name, path in paths.items():

        def step(path: Dispatcher = path) -> object:
            return torch.autograd.grad(path(x_TH, chosen, weights, experts), leaves, dy_TH)

        try:
            times[name] = measure(step)
        except ValueError as refused:
            logger.info("%s: not measured: %s", name, refused)
    return times

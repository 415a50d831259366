"""The training suite: whole optimizer steps, dense against mixture, by dispatcher.

Every kind of model is in a process of its own.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.layer import error_row, timing_fields
from benchmarks.results import Record, Row
from benchmarks.roofline import measure_rates
from benchmarks.setups import Setup
from benchmarks.steps import GRAPH, Bench, First
from benchmarks.workers import Worker, take_turns
from moe_emergence.training.graph import WARM_UP

REFERENCE = "predecessor"
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Relative difference of first loss and gradient norm from the sequential model in fp32."""
MIXTURES = ("fused", "fused-micro", "sequential", "grouped", "auto")
"""Dispatchers, the one whose memory is measured first."""
MODELS = ("predecessor", "dense", *MIXTURES)
GRAPHED = ("dense-graph", "fused-graph", "grouped-graph")
"""For a GPU."""
BYTES_PER_PARAMETER = 16
"""Weight, gradient and two moments of AdamW, in fp32."""


def measure_training(
    setup: Setup,
    device: str,
    precision: str,
    *,
    budget_s: float,
    models: Sequence[str] = MODELS,
    on_rows: Record | None = None,
) -> list[Row]:
    """One row per model. The predecessor runs in fp32 whatever `precision`, as it did.

    The gate: first loss and gradient norm agree with those of the sequential mixture in fp32.
    `peak_bytes` is of the whole process (resident on a CPU, allocated on a GPU) after two steps;
    of the dispatchers, which share a process, the first has it.
    """
    group = f"{setup.name}/{precision}"
    parameters = {**vars(setup), "dtype": precision}
    rates = {dtype: measure_rates(device, dtype) for dtype in ("fp32", precision)}
    rows: dict[str, Row] = {}
    works: dict[str, Worker] = {}
    with contextlib.ExitStack() as stack:
        mixture = stack.enter_context(Worker(device, Bench, setup, device, precision, "mixture"))
        expected: First = mixture.ask("look", "reference")
        for name in models:
            worker = mixture
            if name.removesuffix(GRAPH) not in MIXTURES:
                kind = name.removesuffix(GRAPH)
                worker = stack.enter_context(Worker(device, Bench, setup, device, precision, kind))
            row = Row("training", group, "step", name, "", parameters=parameters)
            try:
                first: First = worker.ask("look", name)
                state = {"state_bytes": BYTES_PER_PARAMETER * first.parameters}
                row = replace(row, parameters=parameters | state)
                row = replace(row, **_judge(name, first, expected, precision))
                if row.verdict != "failed":
                    works[name] = worker
            except RuntimeError as error:
                row = error_row(row, error, device)
            rows[name] = row
        # only now: a step changes the weights that the dispatchers share
        seen: set[int] = set()
        for name, worker in works.items():
            for _ in range(WARM_UP + 1 if name.endswith(GRAPH) else 2):
                worker.ask("step", name)
            if id(worker) not in seen:
                seen.add(id(worker))
                rows[name] = replace(rows[name], peak_bytes=worker.ask("peak"))
        samples = take_turns(works, budget_s)
    passed = [name for name in samples if rows[name].verdict == "passed"]
    for name, timed in samples.items():
        flops = setup.flops(is_moe=name.removesuffix(GRAPH) != "dense")
        limit_s = flops / rates["fp32" if name == "predecessor" else precision].flops_per_s
        rows[name] = replace(
            rows[name],
            **timing_fields(name, samples, passed, REFERENCE),
            tokens_per_s=setup.tokens / timed.median,
            flops=flops,
            roofline_fraction=limit_s / timed.median,
        )
    found = [rows[name] for name in models]
    if on_rows:
        on_rows(found)
    return found


def _judge(name: str, first: First, expected: First, precision: str) -> dict[str, Any]:
    if name.removesuffix(GRAPH) == "dense":
        return {"verdict": "floor", "note": "the model without mixture layers"}
    # the predecessor's arithmetic is fp32 always
    tolerance = LOSS_TOLERANCE["fp32" if name == "predecessor" else precision]
    pairs = (("loss", first.loss, expected.loss), ("gradient norm", first.norm, expected.norm))
    for what, ours, theirs in pairs:
        if not abs(ours - theirs) <= tolerance * abs(theirs):
            note = f"first {what} {ours:.6g}, sequential in fp32 {theirs:.6g}"
            return {"verdict": "failed", "note": note}
    return {"verdict": "passed"}

"""`pytest --benchmark-only`: one mixture layer, every dispatcher and peer.

On a CPU a choice of groups that takes two minutes; on a GPU every shape. The whole grid is
`python -m benchmarks.grid`.
"""

from typing import Any

import pytest
import torch

from benchmarks.command import BUDGET_S, SIZE
from benchmarks.contestants import OURS
from benchmarks.layer import measure_layer, phase_work
from benchmarks.results import Record
from benchmarks.workloads import SHAPES, Case, make_problem

pytest_plugins = ["benchmarks.fixtures"]

ON_CPU = [
    Case(SHAPES["predecessor-k1"]),
    Case(SHAPES["predecessor-k1"], dtype="bf16"),
    Case(SHAPES["small"]),
    Case(SHAPES["small"], "zipf"),
    Case(SHAPES["small"], "collapsed"),
    Case(SHAPES["small"], activation="swiglu"),
    Case(SHAPES["fine-grained"]),
    Case(SHAPES["fine-grained"], "zipf", "bf16"),
]
ON_GPU = [
    Case(s, "balanced", d) for n, s in SHAPES.items() if n != "tiny" for d in ("bf16", "fp32")
]
CASES = ON_GPU if torch.cuda.is_available() else ON_CPU
if SIZE == "tiny":
    CASES = [Case(SHAPES["tiny"])]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace("/", "-"))
def test_layer(case: Case, device: str, record: Record, benchmark: Any) -> None:
    """All phases and contestants of a case; pytest-benchmark's own figure is `auto`'s full pass."""
    rows = measure_layer(case, device, budget_s=BUDGET_S)
    record(rows)
    problem = make_problem(case, device)
    auto = next(entry for entry in OURS if entry.name == "auto").prepare(problem)
    work = phase_work(auto, problem.dy_TH, "full")
    benchmark.group = case.name

    def once() -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=3, warmup_rounds=1)

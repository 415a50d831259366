"""`pytest --benchmark-only`: one mixture layer, every dispatcher and peer.

On a CPU a choice of groups that takes two minutes; on a GPU every shape. The whole grid is
`python -m benchmarks.grid`.
"""

from typing import Any

import pytest
import torch

from benchmarks.command import BUDGET_S, SIZE
from benchmarks.layer import measure_layer
from benchmarks.results import Record, Row
from benchmarks.workloads import SHAPES, Case

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
    """All phases and contestants of a case."""

    def measure() -> list[Row]:
        return measure_layer(case, device, budget_s=BUDGET_S)

    record(benchmark.pedantic(measure, rounds=1))

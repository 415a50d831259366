"""`pytest --benchmark-only`: growth with tokens, experts and experts per token."""

from typing import Any

from benchmarks.command import BUDGET_S, SIZE
from benchmarks.results import Record, Row
from benchmarks.scaling import measure_scaling

pytest_plugins = ["benchmarks.fixtures"]


def test_scaling(device: str, record: Record, benchmark: Any) -> None:
    """All sizes of the three sweeps."""

    def measure() -> list[Row]:
        dtype = "bf16" if device == "cuda" else "fp32"
        return measure_scaling(device, dtype, budget_s=BUDGET_S / 6, tiny=SIZE == "tiny")

    record(benchmark.pedantic(measure, rounds=1))

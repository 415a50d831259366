"""`pytest --benchmark-only`: growth with tokens, experts and experts per token."""

from typing import Any

from benchmarks.fixtures import Record
from benchmarks.results import Row
from benchmarks.scaling import measure_scaling

pytest_plugins = ["benchmarks.fixtures"]


def test_scaling(device: str, record: Record, benchmark: Any) -> None:
    """pytest-benchmark's own figure is the time of the whole study."""
    benchmark.group = "scaling"

    def study() -> list[Row]:
        return measure_scaling(device, "bf16" if device == "cuda" else "fp32", budget_s=0.5)

    record(benchmark.pedantic(study, rounds=1))

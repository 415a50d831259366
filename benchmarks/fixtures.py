"""The pytest side of the suites: what a `bench_*.py` file needs.

A bench is one group. It measures all contestants in turns by itself and puts its rows into
pytest-benchmark's `extra_info`; pytest-benchmark times `auto` (or the sweep) for its own table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch

from benchmarks.results import Record, Row, describe_environment


@pytest.fixture
def device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def benchmark_only(request: pytest.FixtureRequest) -> None:
    """Skip unless timing was asked for: a plain `pytest` measures nothing."""
    if not request.config.getoption("--benchmark-only", default=False):
        pytest.skip("timed by pytest --benchmark-only")


@pytest.fixture(scope="session")
def environment() -> Mapping[str, Any]:
    """The record that goes with the rows."""
    return describe_environment("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def record(benchmark_only: None, benchmark: Any, environment: Mapping[str, Any]) -> Record:
    """Put rows into the results; every row must have a verdict, and none of ours may be wrong."""

    def keep(rows: Sequence[Row]) -> None:
        benchmark.extra_info["environment"] = dict(environment)
        benchmark.extra_info["rows"] = [asdict(row) for row in rows]
        ours = ("sequential", "grouped", "fused", "auto")
        wrong = [r for r in rows if r.contestant in ours and r.verdict in ("failed", "error")]
        assert not wrong, [f"{r.contestant}, {r.group}: {r.note}" for r in wrong]

    return keep

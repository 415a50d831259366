"""The pytest side of the suites: what a `bench_*.py` file needs, and the comparison at the end.

A bench measures the groups of a suite, all contestants in turns, by itself. Its rows are kept in
`runs/benchmarks/pytest.json`, and who won is shown at the end and written beside it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.comparison import comparison
from benchmarks.results import Journal, Record, Row, describe_environment

RESULTS = Path("runs", "benchmarks", "pytest.json")
"""From the folder that pytest was started in."""
JOURNAL = pytest.StashKey[Journal]()


@pytest.fixture
def device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def benchmark_only(request: pytest.FixtureRequest) -> None:
    """Skip unless timing was asked for: a plain `pytest` measures nothing."""
    if not request.config.getoption("--benchmark-only", default=False):
        pytest.skip("timed by pytest --benchmark-only")


@pytest.fixture
def record(benchmark_only: None, pytestconfig: pytest.Config, device: str) -> Record:
    """Keep rows; every row must have a verdict, and none of ours may be wrong."""
    if JOURNAL not in pytestconfig.stash:
        path = pytestconfig.invocation_params.dir / RESULTS
        pytestconfig.stash[JOURNAL] = Journal(path, describe_environment(device))
    journal = pytestconfig.stash[JOURNAL]

    def keep(rows: Sequence[Row]) -> None:
        journal.add(rows)
        ours = ("sequential", "grouped", "fused", "auto")
        wrong = [r for r in rows if r.contestant in ours and r.verdict in ("failed", "error")]
        assert not wrong, [f"{r.contestant}, {r.group}: {r.note}" for r in wrong]

    return keep


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_group_stats() -> list[Any]:
    """No table of pytest-benchmark's own: it would hold how long each bench took."""
    return []


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Show who won, last of all, and write it down."""
    journal = config.stash.get(JOURNAL, None)
    if journal is None or not journal.rows:
        return
    text = comparison(journal.rows)
    written = journal.path.with_suffix(".md")
    written.write_text(text, encoding="utf-8")
    terminalreporter.section("benchmarks")
    terminalreporter.write(text)
    terminalreporter.write_line(f"\nThis comparison: {written}\nEvery row: {journal.path}")

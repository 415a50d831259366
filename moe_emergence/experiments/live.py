"""The runs of a suite while they run: a live table on a terminal, a line now and then elsewhere."""

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.live import Live
from rich.table import Table

from moe_emergence.experiments.plan import PlannedRun
from moe_emergence.terminal import Console

logger = logging.getLogger(__name__)

_TAIL_BYTES = 16_384
_LOG_SECONDS = 60.0
_ROWS = 24


@dataclass(frozen=True)
class Reading:
    """The newest numbers of a run's metrics."""

    step: int = 0
    lm_loss: float | None = None
    tokens_per_s: float | None = None


def read_progress(metrics: Path) -> Reading:
    """What the end of a `metrics.jsonl` says; lines that are being written are passed over."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return Reading()
    found: dict[str, Any] = {}
    for line in lines:
        try:
            found |= json.loads(line)
        # the first line of the tail is half of one
        except ValueError:
            continue
    return Reading(
        int(found.get("step", 0)), found.get("train/lm_loss"), found.get("perf/tokens_per_sec")
    )


class LiveTable:
    """Shows the state of every run; a context manager."""

    def __init__(self, runs: Sequence[PlannedRun]) -> None:
        self.runs = runs
        self.started = self._logged = time.monotonic()
        self._done_before: int | None = None
        console = Console(stderr=True)
        self._live = Live(console=console, auto_refresh=False) if sys.stderr.isatty() else None

    def __enter__(self) -> "LiveTable":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, states: Sequence[tuple[str, str]]) -> None:
        """Show the (state, note) of every run, in the order of the runs."""
        steps = self._steps(states)
        if self._live is not None:
            self._live.update(self._table(states, self._left(steps)), refresh=True)
        elif time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            complete = sum(state == "complete" for state, _ in states)
            logger.info("%d of %d runs complete, %s left", complete, len(states), self._left(steps))

    def _steps(self, states: Sequence[tuple[str, str]]) -> tuple[int, int]:
        """Steps done and planned, of the runs that have not failed."""
        done = planned = 0
        for run, (state, _) in zip(self.runs, states, strict=True):
            if state == "failed":
                continue
            length = run.config.optim.max_steps
            planned += length
            if state == "complete":
                done += length
            elif state != "waiting":
                done += read_progress(run.run.metrics).step
        return done, planned

    def _left(self, steps: tuple[int, int]) -> str:
        """Time left at the pace since the start."""
        done, planned = steps
        if self._done_before is None:
            self._done_before = done
        gained = done - self._done_before
        if not gained:
            return "an unknown time"
        seconds = (time.monotonic() - self.started) / gained * (planned - done)
        return f"{seconds / 60:.0f} min"

    def _table(self, states: Sequence[tuple[str, str]], left: str) -> Table:
        counts = {name: sum(s == name for s, _ in states) for name in dict(states)}
        title = ", ".join(f"{count} {name}" for name, count in counts.items())
        table = Table("run", "state", "step", "lm_loss", "tokens/s", title=f"{title}; {left} left")
        # complete and waiting runs are counted in the title: a suite has more than a screen holds
        shown = [
            (run, state)
            for run, state in zip(self.runs, states, strict=True)
            if state[0] not in ("complete", "waiting")
        ]
        for run, (state, note) in shown[:_ROWS]:
            now = read_progress(run.run.metrics)
            table.add_row(
                run.name,
                f"{state}: {note}" if note else state,
                f"{now.step}/{run.config.optim.max_steps}",
                "" if now.lm_loss is None else f"{now.lm_loss:.4f}",
                "" if now.tokens_per_s is None else f"{now.tokens_per_s:,.0f}",
            )
        return table

"""Where a run's measurements go: `metrics.jsonl`, the tracker and the progress bar."""

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from moe_emergence.config import RunConfig
from moe_emergence.errors import RunError
from moe_emergence.run_folder import MetricsWriter, RunFolder
from moe_emergence.settings import to_dict
from moe_emergence.training.metrics import StepRecord, check_finite, step_row
from moe_emergence.training.progress import TrainingProgress
from moe_emergence.training.routing_view import RoutingView
from moe_emergence.training.tracking import Tracking


class Recorder:
    """Context manager that keeps a run's measurements; only the main process writes any.

    Args:
        config: of the run.
        run: its folder.
        domains: of the training text, in the order of the loader's.
        is_main: whether this process writes.
        stage: which of an experiment's runs it is, for the progress bar.
        tokens_per_step: over all processes.
        first_step: steps done already; rows of later ones are dropped. -1 drops all.
        train_seconds: spent on those steps.
        where: says of a step (from 1) where its first value is that is not finite.
    """

    def __init__(
        self,
        config: RunConfig,
        run: RunFolder,
        *,
        domains: Sequence[str],
        is_main: bool,
        stage: str,
        tokens_per_step: int,
        first_step: int,
        train_seconds: float,
        where: Callable[[int], str],
    ) -> None:
        self.train_seconds, self._domains, self._where = train_seconds, domains, where
        self._run, self._is_main, self._tokens_per_step = run, is_main, tokens_per_step
        # what the collapse detector sees is on record
        self._router_every = config.monitor.log_router_every, config.monitor.collapse_every
        self._moe_layers = config.model.moe_layers
        self._metrics = MetricsWriter(run.metrics)
        self._pending: list[StepRecord] = []
        self._clock = time.perf_counter()
        if is_main:
            self._metrics.keep_up_to(first_step)
        tracker = config.monitor.track if is_main else "none"
        self._tracking = Tracking(tracker, run.root, config.run_name, to_dict(config))
        view = RoutingView(config.model.moe_layers, config.model.num_experts)
        self._progress = TrainingProgress(
            config.run_name,
            stage,
            max(first_step, 0),
            config.optim.max_steps,
            view if config.monitor.live else None,
            enabled=is_main,
        )

    def __enter__(self) -> "Recorder":
        self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.__exit__(kind, error, traceback)
        self._tracking.finish()

    def start_clock(self) -> None:
        """Training goes on from here; what came before does not count as training time."""
        self._clock = time.perf_counter()

    def step(self, record: StepRecord) -> None:
        """Keep what a step measured, on the device, until the next `flush`."""
        self._pending.append(record)

    def flush(self) -> None:
        """Move the steps' measurements off the device in one go and write their rows.

        Raises:
            RunError: when a loss or gradient norm is not finite; the rows before it are written.
        """
        if not self._pending:
            return
        rows = [
            step_row(
                record,
                self._domains,
                self._moe_layers if any(record.step % n == 0 for n in self._router_every) else (),
            )
            for record in self._pending
        ]
        seconds = time.perf_counter() - self._clock
        rate = len(rows) * self._tokens_per_step / seconds
        rows[-1]["perf/tokens_per_sec"] = rate
        self.train_seconds += seconds
        self._pending = []
        self.start_clock()
        good, failure = check_finite(rows)
        self._write(good)
        if failure is not None:
            raise self.failure(f"{failure}: {self._where(rows[len(good)]['step'])}")
        self._progress.update(rows[-1])

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Write the row of an evaluation."""
        row = {"step": step, **metrics}
        self._progress.evaluated(row)
        self._write([row])

    def failure(self, reason: str) -> RunError:
        """The error that ends the run for `reason`, with advice."""
        steps = self._run.checkpoint_steps()
        last = str(self._run.checkpoint(steps[-1])) if steps else "none yet"
        return RunError(
            f"{reason}; start again under another --run-name with a lower --learning-rate or "
            f"--precision fp32; last checkpoint: {last}"
        )

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if self._is_main:
            self._metrics.append(rows)
            for row in rows:
                self._tracking.log(row)

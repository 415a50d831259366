"""What a person sees while a run trains: a bar with loss, speed and time left, and the routing."""

from collections.abc import Mapping
from types import TracebackType

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from moe_emergence.run_folder import losses_by_domain
from moe_emergence.terminal import Console
from moe_emergence.training.routing_view import RoutingView


class TrainingProgress:
    """Context manager around one run's bar on stderr, which is gone at its end.

    Where stderr is no terminal only evaluations are printed.

    Args:
        name: of the run.
        stage: which of an experiment's it is; empty where it is the only one.
        done: steps.
        total: steps.
        routing: what to show under the bar, if anything.
        enabled: silent without it.
    """

    def __init__(
        self,
        name: str,
        stage: str,
        done: int,
        total: int,
        routing: RoutingView | None,
        *,
        enabled: bool,
    ) -> None:
        console = Console(stderr=True, quiet=not enabled)
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        title = f"{stage}  {name}" if stage else name
        self._task = self._bar.add_task(escape(title), total=total, completed=done, status="")
        shown = [self._bar] if routing is None else [self._bar, routing]
        self._live = Live(Group(*shown), console=console, transient=True)
        self._name, self._routing = name, routing

    def __enter__(self) -> "TrainingProgress":
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def update(self, row: Mapping[str, float]) -> None:
        """Move the bar to the step of the newest row of `metrics.jsonl`, and show what it says."""
        loss, speed = row["train/lm_loss"], row["perf/tokens_per_sec"]
        status = f"lm_loss {loss:.3f}  {speed:,.0f} tokens/s"
        self._bar.update(self._task, completed=row["step"], status=status)
        self._show(row)

    def evaluated(self, row: Mapping[str, float]) -> None:
        """Print an evaluation above the bar."""
        domains = "  ".join(f"{d} {loss:.3f}" for d, loss in losses_by_domain(row).items())
        self._live.console.print(
            f"{self._name} step {row['step']}: eval lm_loss {row['eval/lm_loss']:.3f} ({domains})",
            highlight=False,
            markup=False,
        )
        self._show(row)

    def _show(self, row: Mapping[str, float]) -> None:
        if self._routing is not None:
            self._routing.read(row)

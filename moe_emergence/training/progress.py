"""What a person sees while a run trains: a bar with loss, tokens/s and time left."""

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
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


class TrainingProgress:
    """Context manager around one run's progress bar, on stderr; silent when not `enabled`."""

    def __init__(self, name: str, done: int, total: int, *, enabled: bool) -> None:
        self._console = Console(stderr=True, quiet=not enabled)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task(escape(name), total=total, completed=done, status="")
        self._name = name

    def __enter__(self) -> "TrainingProgress":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, step: int, loss: float, tokens_per_sec: float) -> None:
        """Move the bar to `step`."""
        status = f"lm_loss {loss:.3f}  {tokens_per_sec:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, status=status)

    def evaluated(self, step: int, row: Mapping[str, float]) -> None:
        """Print an evaluation above the bar."""
        domains = "  ".join(f"{d} {loss:.3f}" for d, loss in losses_by_domain(row).items())
        self._progress.console.print(
            f"{self._name} step {step}: eval lm_loss {row['eval/lm_loss']:.3f} ({domains})",
            highlight=False,
            markup=False,
        )

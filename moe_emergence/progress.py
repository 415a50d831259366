"""One progress bar on stderr for work that can take more than two seconds."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(description: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """Show a bar while the block runs and yield the function that advances it by an amount.

    Nothing is written where stderr is not a terminal, and nothing stays there. `total` and the
    amounts share one unit; without a total the bar only shows that something is being done.
    """
    from rich.progress import Progress

    from moe_emergence.terminal import Console

    terminal = sys.stderr.isatty()
    console = Console(stderr=True)
    with Progress(console=console, disable=not terminal, transient=True) as bars:
        task = bars.add_task(description, total=total)
        yield lambda amount: bars.advance(task, amount)

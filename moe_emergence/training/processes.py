"""What the processes of a run must agree on, and what becomes of the others when one fails."""

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object

from moe_emergence.errors import RunError

PATIENCE = timedelta(minutes=10)
"""A process that does not answer for so long is lost; writing a checkpoint takes less."""
PATIENCE_FOR_DATA = timedelta(days=1)
"""The first process may read and tokenise for hours while the others wait."""


def on_main(
    accelerator: Accelerator, action: Callable[[], object], patience: timedelta | None = None
) -> None:
    """Do something in the main process while the others wait.

    Args:
        accelerator: of the run.
        action: what only the main process does.
        patience: of the others; None is that of the run.

    Raises:
        ValueError, RunError: in every process alike, what `action` raised.
    """
    group = None
    if patience is not None and accelerator.num_processes > 1:
        group = dist.new_group(timeout=patience, backend="gloo")
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            action()
        except Exception as error:  # noqa: BLE001 raised below, when the others know
            failure = error
    if accelerator.num_processes > 1:
        said = [None if failure is None else (isinstance(failure, ValueError), str(failure))]
        dist.broadcast_object_list(said, src=0, group=group)
        if said[0] is not None and failure is None:
            of_settings, message = said[0]
            failure = ValueError(message) if of_settings else RunError(message)
    if failure is not None:
        raise failure
    if group is not None:
        dist.destroy_process_group(group)


def largest(accelerator: Accelerator, number: int) -> int:
    """Of the processes' numbers: what one of them asks for, all do at the same step."""
    if accelerator.num_processes == 1:
        return number
    own = torch.tensor([number], device=accelerator.device)
    return int(accelerator.gather(own).max())


def check_alike(accelerator: Accelerator, what: str, seen: object) -> None:
    """Refuse to go on where processes see different files of a run: each would do another thing."""
    if accelerator.num_processes == 1:
        return
    everywhere = gather_object([seen])
    if any(one != everywhere[0] for one in everywhere):
        raise ValueError(
            f"{what}: the processes see different files there ({everywhere}); it must be on "
            f"storage that all machines share"
        )


def lost(error: BaseException) -> bool:
    """Whether another process ended, or no longer answers."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )

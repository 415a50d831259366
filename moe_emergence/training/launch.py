"""Making `accelerate launch --cpu --num_processes N` start N processes.

Accelerate's launcher starts a single process on CPUs unless it is given an mpirun host file
(huggingface/accelerate issue 2741), and the training would silently run on that one. The missing
processes are started with torchrun, which Accelerate then finds itself in as usual.
"""

import os
import sys
from collections.abc import Mapping, Sequence

import psutil

_COUNTERS = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def missing_processes(environment: Mapping[str, str], parent: Sequence[str]) -> int:
    """Processes that an `accelerate launch --cpu` asked for and did not start, 0 if none are.

    Args:
        environment: of this process.
        parent: the command line of its parent.

    Raises:
        ValueError: when more than one was asked for but the command line does not say how many.
    """
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    # the launcher names a main process only when it was asked for several
    if not on_cpu or "MASTER_PORT" not in environment or any(c in environment for c in _COUNTERS):
        return 0
    for place, argument in enumerate(parent):
        name, _, value = argument.partition("=")
        if name in ("--num_processes", "--num-processes"):
            asked = value or (parent[place + 1] if place + 1 < len(parent) else "")
            if asked.isdigit():
                return int(asked) if int(asked) > 1 else 0
    raise ValueError(
        "accelerate launch --cpu: it starts one process where its configuration asks for several; "
        "use torchrun --nproc-per-node N -m moe_emergence.train --device cpu"
    )


def start_missing_processes(module: str, argv: Sequence[str]) -> None:
    """Replace this process by a torchrun of `python -m module argv` where processes are missing."""
    parent = psutil.Process().parent()
    count = missing_processes(os.environ, parent.cmdline() if parent is not None else [])
    if count:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        os.execv(sys.executable, [sys.executable, *torchrun, "-m", module, *argv])

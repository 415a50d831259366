"""The machine side of a run: device, precision, processes, and a record of the versions."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from moe_emergence.config import RunConfig
from moe_emergence.device import find_device
from moe_emergence.training import processes
from moe_emergence.training.sharding import ShardedAccelerator

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "torchdata", "triton")


def make_accelerator(config: RunConfig) -> Accelerator:
    """The `Accelerator` for `--device` and `--precision`, in however many processes were launched.

    Raises:
        ValueError: for a device that is not there.
    """
    on_cpu = find_device(config.device).type == "cpu"
    precision = config.optim.precision
    if precision == "auto":
        precision = "fp32" if on_cpu or not torch.cuda.is_bf16_supported() else "bf16"
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    options: dict[str, Any] = {
        "cpu": on_cpu,
        "mixed_precision": "bf16" if precision == "bf16" else "no",
        "kwargs_handlers": [ddp, InitProcessGroupKwargs(timeout=processes.PATIENCE)],
    }
    if config.fsdp_size > 1:
        accelerator: Accelerator = ShardedAccelerator(config.fsdp_size, **options)
    else:
        accelerator = Accelerator(**options)
    # the step weighs its micro-batches itself, whatever the launcher's environment says
    accelerator.gradient_accumulation_steps = 1
    return accelerator


def describe_environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, device, processes and commit, JSON-ready, for `environment.json`."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {p: version for p in _PACKAGES if (version := _version(p)) is not None},
        "device": device.type,
        "device_name": name or platform.machine(),
        "precision": "bf16" if accelerator.mixed_precision == "bf16" else "fp32",
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "command": [_program(), *sys.argv[1:]],
    }


def _program() -> str:
    """The name of the script, or that of the package whose `__main__` it is."""
    path = Path(sys.argv[0])
    return f"{path.parent.name}.py" if path.name == "__main__.py" else path.name


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The git commit the code was run from, or None for an installed package."""
    source = Path(__file__).resolve().parent
    command = ["git", "-C", str(source), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None

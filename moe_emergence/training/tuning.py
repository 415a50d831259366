"""Which measurements of this machine a run uses, and making them when it is asked to."""

from pathlib import Path

import torch
from accelerate import Accelerator

from emergence_kernels.operators import triton_is_installed
from moe_emergence.config import RunConfig
from moe_emergence.models import MixtureModel
from moe_emergence.moe.autotune import autotune
from moe_emergence.moe.tuning import TuningTable, load_table, table_path

_COMPUTE_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_can_tune(config: RunConfig, accelerator: Accelerator) -> None:
    """Refuse `--autotune` where it would measure nothing, or not what is computed."""
    if config.autotune and config.ep_size > 1:
        raise ValueError(
            f"--autotune: it measures all experts, and with --ep-size {config.ep_size} a process "
            "has a share of them; leave one of both out"
        )
    if config.autotune and accelerator.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"--autotune: there is nothing to measure on {accelerator.device.type}; leave it out, "
            "or give --device cpu or --device cuda"
        )


def tokens_of_a_pass(config: RunConfig) -> int:
    """Tokens that a mixture layer gets at once in training, see `forward_backward`."""
    optim = config.optim
    at_once = optim.grad_accum_steps if optim.balance_scope == "global" else 1
    return at_once * optim.batch_size * config.data.block_size


def measured(
    config: RunConfig, model: MixtureModel, accelerator: Accelerator
) -> TuningTable | None:
    """What is known about this device; with `--autotune`, this run's shape is measured first."""
    device = accelerator.device
    tunable = device.type == "cpu" or (device.type == "cuda" and triton_is_installed())
    if not tunable or config.dispatch not in ("auto", "fused"):
        return None
    cache_dir = Path(config.data.cache_dir)
    layers = list(model.moe_layers().values())
    if config.autotune and layers:
        layer = layers[0].to(device)
        tokens = tokens_of_a_pass(config)
        dtype = _COMPUTE_DTYPES[accelerator.mixed_precision]
        # one process of a machine measures, the others read what it wrote
        with accelerator.local_main_process_first():
            autotune(layer.experts, tokens, config.model.top_k, dtype, cache_dir)
    return load_table(table_path(cache_dir, device))

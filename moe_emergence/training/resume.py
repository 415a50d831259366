"""What `--resume` means, and what must be the same for it to mean the same run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_emergence.config import RunConfig
from moe_emergence.data.manifest import check_same_data
from moe_emergence.run_folder import RunFolder, read_json
from moe_emergence.settings import to_dict
from moe_emergence.training.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint

_FREE = frozenset(
    {
        "preset",
        "run_name",
        "output_dir",
        "resume",
        "stop_after",
        "device",
        "dispatch",
        "autotune",
        "cuda_graph",
        "fsdp_size",
        "ep_size",
        "debug",
        "optim.batch_size",
        "optim.grad_accum_steps",
        "optim.compare_dense",
        "optim.compare_null",
        "monitor.eval_every",
        "monitor.save_every",
        "monitor.keep_last_k",
        "monitor.log_every",
        "monitor.log_router_every",
        "monitor.track",
        "monitor.live",
    }
)


def find_checkpoint(resume: str | None, run: RunFolder) -> Checkpoint | None:
    """The checkpoint `--resume` names: None, "auto" (newest of the run, if any) or a folder.

    Raises:
        ValueError: when the run exists and is not to be resumed, when the folder is no whole
            checkpoint, or when resuming it would overwrite newer ones of the same run.
    """
    if resume is None:
        if run.exists:
            raise ValueError(
                f"--run-name {run.root.name}: {run.root} already holds a run; give another "
                f"--run-name, or go on with --resume auto"
            )
        return None
    if resume == "auto":
        return newest_checkpoint(run)
    checkpoint = load_checkpoint(Path(resume))
    newest = newest_checkpoint(run)
    if newest is not None and newest.step > checkpoint.step:
        raise ValueError(
            f"--resume {resume}: {run.root} has a newer checkpoint, step {newest.step}; use "
            f"--resume auto, or give another --run-name to branch off"
        )
    return checkpoint


def check_same_run(
    saved: RunConfig, config: RunConfig, tokens_per_step: tuple[int, int] | None = None
) -> None:
    """Refuse to go on with settings that would make it another run.

    The data is compared by content (`check_same_data`), not by where it comes from. How the batch
    is split may change (fewer processes, other micro-batches) as long as the step sees the same
    tokens; with balance scope "micro" the micro-batch is part of the loss and may not.

    Args:
        saved: the configuration the run was started with.
        config: the one it is to go on with.
        tokens_per_step: then and now.

    Raises:
        ValueError: naming the flag, both values and what to change.
    """
    present = dict(_leaves(to_dict(config)))
    free = set(_FREE) | {name for name in present if name.startswith("data.")}
    if config.optim.balance_scope == "micro":
        free.discard("optim.batch_size")
    for name, before in _leaves(to_dict(saved)):
        if name not in free and present.get(name) != before:
            flag = "--" + name.rpartition(".")[2].replace("_", "-")
            raise ValueError(
                f"{flag} {present.get(name)}: the run to resume was started with {before}; give "
                f"that, or start a new one with another --run-name"
            )
    if tokens_per_step is not None and tokens_per_step[0] != tokens_per_step[1]:
        raise ValueError(
            f"--batch-size {config.optim.batch_size}: a step would see {tokens_per_step[1]} tokens "
            f"where the run to resume sees {tokens_per_step[0]}; keep --batch-size x "
            f"--grad-accum-steps x processes the same"
        )


def check_same_data_as(
    run: RunFolder, checkpoint: Checkpoint | None, manifest: Mapping[str, Any]
) -> None:
    """Refuse to go on with data other than that of the run, or of the checkpoint's run."""
    saved = [] if checkpoint is None else [checkpoint.data_manifest]
    if run.data_manifest.exists():
        saved.append(read_json(run.data_manifest))
    for one in saved:
        check_same_data(one, dict(manifest))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value

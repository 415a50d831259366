"""Resumable checkpoints: complete or absent, and never unpickled into arbitrary objects.

A checkpoint is a Hugging Face model folder with two more files: `trainer.pt` (optimizer and loader
states, read with `weights_only=True`) and `checkpoint.json` (step, counters,
configuration, the SHA-256 of every other file and of its own text).
"""

import hashlib
import json
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_emergence.disk import clear_unfinished, remove_folder, whole_folder
from moe_emergence.run_folder import RunFolder, read_json

logger = logging.getLogger(__name__)

FORMAT = "moe_emergence checkpoint 2"
MANIFEST = "checkpoint.json"
TRAINER_STATE = "trainer.pt"
_KEYS = frozenset({"format", "step", "progress", "config", "data_manifest", "files"})
_BLANK = "0" * 64


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read and found whole."""

    path: Path
    step: int
    progress: dict[str, Any]
    """JSON-ready counters: best loss, collapse streaks, seconds spent."""
    config: dict[str, Any]
    """The run configuration, as `config.to_dict` gives it."""
    data_manifest: dict[str, Any]
    """Of the data the run was trained on."""
    trainer_state: dict[str, Any]
    """State dicts of optimizer, loader and churn probe."""


def save_model_folder(
    target: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a Hugging Face folder (model and tokenizer) beside `target`, then swap it in.

    `weights` is the state dict of a model that holds a share of it only, or None.
    """
    with whole_folder(target) as folder:
        _write_model(folder, model, tokenizer, weights)


def save_checkpoint(
    run: RunFolder,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor] | None,
    trainer_state: dict[str, Any],
    progress: dict[str, Any],
    config: dict[str, Any],
    data_manifest: dict[str, Any],
    keep_last_k: int,
) -> Path:
    """Write the checkpoint of `step`, then delete those before it, see `delete_old_checkpoints`.

    For `weights` see `save_model_folder`.

    Raises:
        RunError: when the disk is full or not writable; older checkpoints stay as they are.
    """
    target = run.checkpoint(step)
    with whole_folder(target) as folder:
        _write_model(folder, model, tokenizer, weights)
        # into a file of Python's: torch's own calls a full disk an "iostream error"
        with (folder / TRAINER_STATE).open("wb") as file:
            torch.save(trainer_state, file)
        manifest = {
            "format": FORMAT,
            "step": step,
            "progress": progress,
            "config": config,
            "data_manifest": data_manifest,
            "files": {name: _sha256(folder / name) for name in _files(folder)},
            "sha256": _BLANK,
        }
        text = json.dumps(manifest, indent=2) + "\n"
        # the folder as a whole is synced and renamed
        (folder / MANIFEST).write_text(text.replace(_BLANK, _digest(text)), encoding="utf-8")
    delete_old_checkpoints(run, step, keep_last_k)
    return target


def delete_old_checkpoints(run: RunFolder, step: int, keep_last_k: int) -> None:
    """Delete all but the newest `keep_last_k` of the checkpoints up to that of `step`, which is
    whole; later ones are torn, and will be written again."""
    for old in [s for s in run.checkpoint_steps() if s <= step][:-keep_last_k]:
        remove_folder(run.checkpoint(old))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        ValueError: when it is missing, not a checkpoint of this library, torn, or holds files that
            are not its own, with the reason.
    """
    if not (path / MANIFEST).is_file():
        reason = "there is no such folder" if not path.is_dir() else f"it has no {MANIFEST}"
        raise ValueError(f"--resume {path}: not a checkpoint of this library, {reason}")
    try:
        manifest = _read_manifest(path)
        _check_files(path, manifest["files"])
        with (path / TRAINER_STATE).open("rb") as file:
            trainer_state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"--resume {path}: {TRAINER_STATE} holds something else than tensors and is not loaded"
        ) from error
    except OSError as error:
        raise ValueError(
            f"--resume {path}: the checkpoint cannot be read ({error}); resume from an older one"
        ) from error
    return Checkpoint(
        path,
        manifest["step"],
        manifest["progress"],
        manifest["config"],
        manifest["data_manifest"],
        trainer_state,
    )


def _check_types(path: Path, manifest: dict[str, Any]) -> None:
    """Refuse a manifest with values of other types than `save_checkpoint` writes."""
    progress = manifest["progress"]
    values = {**progress, **manifest} if isinstance(progress, dict) else manifest
    expected: dict[str, tuple[type, ...]] = {
        "step": (int,), "progress": (dict,), "config": (dict,), "data_manifest": (dict,),
        "files": (dict,), "best_eval_lm_loss": (int, float, type(None)),
        "collapse_streaks": (dict,), "train_seconds": (int, float), "wall_seconds": (int, float),
        "tokens_per_step": (int,),
    }  # fmt: skip
    for name, types in expected.items():
        if name not in values or not isinstance(values[name], types):
            raise ValueError(
                f"--resume {path}: the checkpoint is torn, {name} in {MANIFEST} is not what is "
                "written there; resume from an older one"
            )


def newest_checkpoint(run: RunFolder) -> Checkpoint | None:
    """The newest whole checkpoint of a run; torn ones are passed over with a warning.

    Raises:
        ValueError: when there are checkpoints and every one is torn.
    """
    failure: ValueError | None = None
    for step in reversed(run.checkpoint_steps()):
        try:
            return load_checkpoint(run.checkpoint(step))
        except ValueError as error:
            logger.warning("%s", error)
            failure = error
    if failure is not None:
        raise failure
    return None


def recover_folders(run: RunFolder) -> None:
    """Clear away what a killed process left among the folders of a run."""
    clear_unfinished(run.root)
    clear_unfinished(run.checkpoints)


def _read_manifest(path: Path) -> dict[str, Any]:
    """`checkpoint.json`, whose last entry is the digest of the rest.

    Those of earlier versions have none.
    """
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"--resume {path}: in {MANIFEST} the format is {manifest.get('format')!r}; this "
            f"version reads {FORMAT!r}"
        )
    digest = manifest.pop("sha256", None)
    lacking, unknown = _KEYS - manifest.keys(), manifest.keys() - _KEYS
    reason = ""
    if lacking or unknown:
        names = ", ".join(sorted(lacking or unknown))
        reason = f"{MANIFEST} {'lacks' if lacking else 'has what does not belong there:'} {names}"
    elif digest is not None:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        if not isinstance(digest, str) or _digest(text.replace(digest, _BLANK)) != digest:
            reason = f"{MANIFEST} is not what was written; resume from an older one"
    if reason:
        raise ValueError(f"--resume {path}: the checkpoint is torn, {reason}")
    _check_types(path, manifest)
    return manifest


def _check_files(path: Path, digests: dict[str, str]) -> None:
    """`ValueError` unless the files are those that were written, and no others.

    Another file may change what is loaded. Folders, as of an analysis, and hidden files do not.
    """
    for name, digest in digests.items():
        reason = ""
        if not (path / name).is_file():
            reason = f"{name} is missing"
        elif _sha256(path / name) != digest:
            reason = f"{name} is not what was written; resume from an older one"
        if reason:
            raise ValueError(f"--resume {path}: the checkpoint is torn, {reason}")
    others = [name for name in _files(path) if name not in digests and name != MANIFEST]
    if others:
        raise ValueError(
            f"--resume {path}: {', '.join(others)} was not written with the checkpoint; move it "
            "elsewhere"
        )


def _files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor] | None,
) -> None:
    # one shard whatever the size, so that the weights have one name
    model.save_pretrained(folder, state_dict=weights, max_shard_size="1TB")
    tokenizer.save_pretrained(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

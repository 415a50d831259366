"""The files of a run: where each lives, and how each is written without ever being half there."""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_emergence.errors import RunError
from moe_emergence.interrupt import finishing

STAGES = {
    "base": "dense base",
    "moe": "mixture",
    "dense": "dense",
    "null": "random router",
}
"""What the runs of an experiment are called, by role."""
LOCK = ".lock"
"""In a folder that a process writes to, see `run_lock`; it is not part of what is there."""
TRAINER_ROUTING = "routing.jsonl"
"""Metrics in the output folder of a transformers Trainer, see `MoERoutingCallback`."""


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run folder."""

    root: Path

    @property
    def config(self) -> Path:
        """The configuration the run was started with."""
        return self.root / "config.json"

    @property
    def environment(self) -> Path:
        """Versions, device and commit."""
        return self.root / "environment.json"

    @property
    def data_manifest(self) -> Path:
        """Counts and hashes of every split."""
        return self.root / "data_manifest.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per line, each with its `step`."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the resumable checkpoints."""
        return self.root / "checkpoints"

    @property
    def best_model(self) -> Path:
        """Hugging Face folder of the model with the lowest evaluation lm_loss."""
        return self.root / "best-model"

    @property
    def final_model(self) -> Path:
        """Hugging Face folder of the model after the last step."""
        return self.root / "final-model"

    @property
    def expert_domain(self) -> Path:
        """Table of who routes where at the last evaluation, see `domain_fractions`."""
        return self.root / "expert_domain.csv"

    @property
    def routing(self) -> Path:
        """Where the final model sends the evaluation blocks, see `analysis.routing_record`."""
        return self.root / "routing.npz"

    @property
    def modules(self) -> Path:
        """The test of the final model's modules, see `analysis.modules`."""
        return self.root / "modules.csv"

    @property
    def summary(self) -> Path:
        """How the run ended."""
        return self.root / "run_summary.json"

    @property
    def exists(self) -> bool:
        """Whether a run, or a run it depends on, was started here."""
        return self.root.is_dir() and any(p.name != LOCK for p in self.root.iterdir())

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after optimizer step `step`."""
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps with a checkpoint, ascending."""
        names = (p.name for p in self.checkpoints.glob("step-*"))
        return sorted(int(n.removeprefix("step-")) for n in names if n[5:].isdigit())


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` to `path` as JSON, see `write_text`."""
    write_text(path, json.dumps(values, indent=2) + "\n")


@finishing()
def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`: complete, or not at all.

    Raises:
        RunError: when the disk is full or not writable, naming the path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise disk_error(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        ValueError: when it is missing or not a JSON object, naming the path.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {type(values).__name__}, not a JSON object")
    return values


def disk_error(path: Path, error: OSError) -> RunError:
    """The one-line failure for a path that cannot be written."""
    return RunError(
        f"cannot write {path}: {error.strerror or error}; free some space or give another "
        f"folder (--output-dir or --out). What was saved before is untouched"
    )


class MetricsWriter:
    """Appends rows to `metrics.jsonl`; a resumed run first drops the rows after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @finishing()
    def append(self, rows: list[dict[str, Any]]) -> None:
        """Write the rows, all of them or (on a full disk) none, and flush them to disk."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        try:
            with self.path.open("ab") as file:
                end = file.tell()
                try:
                    file.write(text.encode())
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            raise disk_error(self.path, error) from error

    @finishing()
    def keep_up_to(self, step: int) -> None:
        """Drop rows of later steps, and a last line that was cut off while being written."""
        if not self.path.exists():
            return
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            temporary.replace(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise disk_error(self.path, error) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a `metrics.jsonl`, without a last line that was cut off."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path} line {number}: not JSON ({error})") from error
    return rows


_LOSS_OF = "eval/lm_loss_"


def losses_by_domain(row: Mapping[str, Any]) -> dict[str, float]:
    """Evaluation lm_loss of every domain in a row of `metrics.jsonl`, in the order of the run's."""
    return {k.removeprefix(_LOSS_OF): v for k, v in row.items() if k.startswith(_LOSS_OF)}

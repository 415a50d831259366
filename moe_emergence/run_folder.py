"""The files of a run: where each lives, and how each is read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_emergence.config import RunConfig
from moe_emergence.disk import append, named, write_text
from moe_emergence.settings import from_dict

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
    """Write `values` to `path` as JSON, whole or not at all: see `disk.whole_file`."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        ValueError: when it is missing or not a JSON object, naming the path.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {type(values).__name__}, not a JSON object")
    return values


def read_config(path: Path, values: dict[str, Any] | None = None) -> RunConfig:
    """The settings of a run in the file `path`, or `values` that were read from it.

    Raises:
        ValueError: naming the file, for what is no such settings.
    """
    found = read_json(path) if values is None else values
    try:
        return from_dict(RunConfig, found)
    except ValueError as error:
        raise ValueError(f"{path}: not the settings of a run, {error}") from error


class MetricsWriter:
    """Appends rows to `metrics.jsonl`; a resumed run first drops the rows after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Write the rows, all of them or (on a full disk) none; they are on the disk then."""
        append(self.path, _lines(rows).encode())

    def keep_up_to(self, step: int) -> None:
        """Drop rows of later steps, and a last line that was cut off while being written."""
        if self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] <= step]
            write_text(self.path, _lines(kept))


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a `metrics.jsonl`, without a last line that was cut off.

    Raises:
        ValueError: naming the line, for what is no object of numbers with its `step`.
    """
    rows = []
    with named(path, "read"):
        lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise ValueError("no object with its step")
            for name, value in row.items():
                if not isinstance(value, (int, float)):
                    raise ValueError(f"{name} is {type(value).__name__}, no number")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number}: not a row of metrics ({error})") from error
        rows.append(row)
    return rows


_LOSS_OF = "eval/lm_loss_"


def losses_by_domain(row: Mapping[str, Any]) -> dict[str, float]:
    """Evaluation lm_loss of every domain in a row of `metrics.jsonl`, in the order of the run's."""
    return {k.removeprefix(_LOSS_OF): v for k, v in row.items() if k.startswith(_LOSS_OF)}

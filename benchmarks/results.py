"""Rows of measurements, and the JSON document they are kept in."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from moe_emergence.disk import write_text

SCHEMA = 1
_PACKAGES = ("torch", "triton", "transformers", "numpy", "liger-kernel", "megablocks", "scattermoe")
RANKED = ("passed", "floor")
"""Verdicts whose speed-up counts."""


@dataclass(frozen=True)
class Row:
    """One contestant in one phase of one group."""

    suite: str
    """layer, training or scaling."""
    group: str
    """Which numbers: rows of one group and phase were measured interleaved."""
    phase: str
    """forward, backward or full for a layer; step for training."""
    contestant: str
    verdict: str
    """passed; floor (timed, not compared); imprecise (right, but further from fp64 than allowed);
    failed (wrong: not timed); not installed; not applicable; error."""
    note: str = ""
    median_s: float | None = None
    quartiles_s: tuple[float, float] | None = None
    rounds: int = 0
    speedup: float | None = None
    """Median over rounds of the reference's time in that round over this one's."""
    speedup_quartiles: tuple[float, float] | None = None
    next_slower: str = ""
    """Of those that passed, the one behind this one in median."""
    lead: float | None = None
    """Median over rounds of `next_slower`'s time in that round over this one's."""
    lead_quartiles: tuple[float, float] | None = None
    graph_s: float | None = None
    """Median as a CUDA graph, without launch overhead; None where it cannot be captured, which
    `note` then explains."""
    flops: float | None = None
    bytes: float | None = None
    """Lower bound of the memory traffic."""
    roofline_fraction: float | None = None
    """Time the device's measured rates allow, over the time taken."""
    saved_bytes: int | None = None
    """Kept for the backward pass, without inputs and parameters."""
    peak_bytes: int | None = None
    """Peak device memory of one pass above what was allocated before; CUDA only."""
    error_ratio: float | None = None
    """Largest error as a multiple of what the sequential path has in this dtype, at least half an
    ulp."""
    tokens_per_s: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Sizes of the group, for plots: tokens, hidden, width, experts, top_k, dtype, routing..."""

    @property
    def is_ranked(self) -> bool:
        """Whether its time may be held against others."""
        return self.verdict in RANKED and self.median_s is not None


Record = Callable[[Sequence[Row]], None]
"""Takes rows as they are found."""


@dataclass(frozen=True)
class Document:
    """What one command measured."""

    environment: Mapping[str, Any]
    rows: Sequence[Row]


def describe_environment(device: str) -> dict[str, Any]:
    """Device, versions, commit, date and command, JSON-ready."""
    name = _cpu_name()
    if device == "cuda":
        name = torch.cuda.get_device_name()
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # without the folders of this machine
        "command": " ".join(Path(w).name if Path(w).is_absolute() else w for w in sys.orig_argv),
        "device": device,
        "device_name": name,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {p: v for p in _PACKAGES if (v := _version(p)) is not None},
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
    }


def write_document(path: Path, document: Document) -> None:
    """Write JSON such that a reader, or a run cut short, always finds a whole file."""
    content = {"environment": document.environment, "rows": [asdict(row) for row in document.rows]}
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_document(path: Path) -> Document:
    """A document written here; `ValueError` for another file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict) or not {"environment", "rows"} <= content.keys():
        raise ValueError(f"{path}: is not a document of this benchmark suite")
    return Document(content["environment"], [_row(r) for r in content["rows"]])


class Journal:
    """Collects rows and keeps the file on disk complete after every one of them."""

    def __init__(
        self, path: Path, environment: Mapping[str, Any], rows: Iterable[Row] = ()
    ) -> None:
        self.path, self.environment = path, environment
        self.rows: list[Row] = list(rows)
        self.add([])

    def drop(self, suite: str, group: str) -> None:
        """Forget a group that was not finished, and write."""
        self.rows = [row for row in self.rows if (row.suite, row.group) != (suite, group)]
        self.add([])

    def add(self, rows: Iterable[Row]) -> None:
        """Append and write."""
        self.rows += rows
        write_document(self.path, Document(self.environment, self.rows))


def _row(raw: Mapping[str, Any]) -> Row:
    known = {f.name for f in fields(Row)}
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k in known
    }
    return Row(**values)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

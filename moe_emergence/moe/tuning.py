"""What was measured on this machine: how the fused path cuts its products, and the fastest path.

Letters: T tokens, H model width, F expert width, E experts, K experts per token.
"""

import dataclasses
import json
import logging
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from emergence_kernels.batches import BatchPlan
from emergence_kernels.gpu.gemm_config import GemmPlan, rows_bucket
from moe_emergence.disk import DAY, clear_unfinished, write_text
from moe_emergence.moe.experts import Experts
from moe_emergence.names import DispatchName

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TuningKey:
    """What a measurement holds for: T enters as a bucket of rows per expert only."""

    dtype: str
    """Of the products; tf32 for fp32 with reduced precision."""
    hidden: int
    width: int
    experts: int
    top_k: int
    activation: str
    rows_per_expert: int
    """Bucket of the mean rows per expert, see `rows_bucket`."""

    @staticmethod
    def of(x_TH: Tensor, top_k: int, experts: Experts) -> "TuningKey":
        """The key of a call on `x_TH` (T, H)."""
        dtype = x_TH.dtype
        if torch.is_autocast_enabled(x_TH.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x_TH.device.type)
        name = str(dtype).removeprefix("torch.")
        if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            name = "tf32"
        num_experts, width, hidden = experts.w2.shape
        bucket = rows_bucket(x_TH.shape[0] * top_k, num_experts)
        return TuningKey(name, hidden, width, num_experts, top_k, experts.activation, bucket)


@dataclass(frozen=True)
class TuningEntry:
    """What was found for one key."""

    dispatch: str
    """The fastest path."""
    plan: str
    """Fastest cut of the fused path, encoded: a `GemmPlan` on a GPU, a `BatchPlan` on a CPU."""

    @property
    def decoded(self) -> GemmPlan | BatchPlan:
        """The plan; `ValueError` where it is neither."""
        try:
            return BatchPlan.decode(self.plan)
        except ValueError:
            return GemmPlan.decode(self.plan)

    milliseconds: dict[str, float]
    """Forward and backward of every path that was measured."""


@dataclass(frozen=True)
class TuningTable:
    """Measurements on one device, as `--cache-dir` keeps them."""

    entries: dict[TuningKey, TuningEntry]

    def find(self, x_TH: Tensor, top_k: int, experts: Experts) -> TuningEntry | None:
        """The entry for a call on `x_TH`, if its shape was ever measured."""
        if not self.entries:
            return None
        return self.entries.get(TuningKey.of(x_TH, top_k, experts))

    def plan(self, x_TH: Tensor, top_k: int, experts: Experts) -> GemmPlan | BatchPlan | None:
        """How the fused path cuts a call on `x_TH`; None for the defaults."""
        entry = self.find(x_TH, top_k, experts)
        return None if entry is None else entry.decoded


def table_path(cache_dir: Path, device: torch.device) -> Path:
    """The file of this device's table.

    Measurements hold for one version of torch, and for one of Triton or number of threads.
    """
    if device.type == "cpu":
        kind = f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}".replace(" ", "-")
        threads = torch.get_num_threads()
        return cache_dir / "tuning" / f"{kind}-{threads}-threads-torch{torch.__version__}.json"
    from triton import __version__ as triton_version

    name = torch.cuda.get_device_name(device).replace(" ", "-")
    return cache_dir / "tuning" / f"{name}-torch{torch.__version__}-triton{triton_version}.json"


def load_table(path: Path) -> TuningTable:
    """The table in `path`; empty where there is none. An unreadable one is reported and ignored:
    the defaults are right without it."""
    if not path.exists():
        return TuningTable({})
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        entries = {TuningKey(**row["key"]): TuningEntry(**row["entry"]) for row in rows}
        for entry in entries.values():
            _ = entry.decoded
            if entry.dispatch not in get_args(DispatchName):
                raise ValueError(f"dispatch {entry.dispatch!r}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        logger.warning("%s: not a tuning table (%s); using the defaults", path, error)
        return TuningTable({})
    return TuningTable(entries)


def save_table(table: TuningTable, path: Path) -> None:
    """Write the table, whole or not at all."""
    rows = [
        {"key": dataclasses.asdict(key), "entry": dataclasses.asdict(entry)}
        for key, entry in table.entries.items()
    ]
    clear_unfinished(path.parent, idle_seconds=DAY)
    write_text(path, json.dumps(rows, indent=1) + "\n")

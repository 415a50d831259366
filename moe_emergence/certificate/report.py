"""The certificate as a person reads it: a table, what is wrong or was refused, and one verdict."""

import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from rich.table import Table
from rich.text import Text

from moe_emergence.certificate.certify import Certificate, Row, Status

# in the order in which they decide a cell
_WORDS = {
    "failed": Text("FAILED", style="bold red"),
    "refused": Text("refused", style="yellow"),
    "not promised": Text("no", style="yellow"),
}


def certificate_table(certificate: Certificate, dispatch: str) -> Table:
    """One line per case (the worse of its activations), one column per arithmetic."""
    rows = [row for row in certificate.rows if row.dispatch == dispatch]
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    table = Table(
        title=f"{dispatch} against sequential: largest error, and rms error / sequential's own",
        caption="fp64: largest error, and its share of the bound",
    )
    table.add_column("case", no_wrap=True)
    for dtype in dtypes:
        table.add_column(dtype, justify="right", no_wrap=True)
    last_was_case = False
    for name in dict.fromkeys(row.name for row in rows):
        same = [row for row in rows if row.name == name]
        if last_was_case and same[0].is_property:
            table.add_section()
        last_was_case = not same[0].is_property
        cells = [_cell([row for row in same if row.dtype == dtype]) for dtype in dtypes]
        table.add_row(name, *cells)
    return table


def _cell(rows: Sequence[Row]) -> Text:
    if not rows:
        return Text("-")
    for status, word in _WORDS.items():
        if any(row.status == status for row in rows):
            return word
    if rows[0].is_property:
        return Text("yes")
    verdicts = [verdict for row in rows for verdict in row.tensors]
    worst = max((v.worst for v in verdicts), default=0.0)
    ratio = max((v.ratio for v in verdicts), default=0.0)
    share = f"{ratio:4.0%}" if rows[0].dtype == "fp64" else f"{ratio:.2f}"
    return Text(f"{worst:.0e} {share}")


def summary_lines(certificate: Certificate, device: torch.device) -> list[str]:
    """Failures one by one, refusals by arithmetic, and the verdict as the last line."""
    lines = []
    for row in certificate.rows:
        if row.status == "failed":
            lines.append(
                f"failed: {row.dispatch}, {row.dtype}, {row.name} ({row.settings['activation']}): "
                f"{row.note}"
            )
    apart: dict[tuple[str, str, str], list[str]] = {}
    for row in certificate.rows:
        if row.status == "refused":
            apart.setdefault((row.status, row.dispatch, row.dtype), []).append(row.note)
        elif row.status == "not promised":
            place = f"{row.dtype}, {row.name}"
            apart.setdefault((row.status, row.dispatch, place), []).append(row.note)
    for (status, dispatch, place), notes in apart.items():
        times = f" {len(notes)} times, first" if len(notes) > 1 else ""
        lines.append(f"{status}: {dispatch}, {place}{times}: {notes[0]}")
    paths = ", ".join(dict.fromkeys(row.dispatch for row in certificate.rows))
    counts = ", ".join(f"{certificate.count(status)} {status}" for status in get_args(Status))
    word = "certified" if certificate.certified else "NOT CERTIFIED"
    machine = describe_machine(device)["device_name"]
    return [*lines, f"verdict: {word}: {paths} on {device.type} ({machine}): {counts}"]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device and versions, JSON-ready."""
    described: dict[str, Any] = {
        "device": device.type,
        "device_name": _cpu_name(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        described["device_name"] = torch.cuda.get_device_name(device)
        described["capability"] = list(torch.cuda.get_device_capability(device))
        described["cuda"] = torch.version.cuda
    return described


def _cpu_name() -> str:
    """As the kernel calls it; `platform.processor` is empty on many systems."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

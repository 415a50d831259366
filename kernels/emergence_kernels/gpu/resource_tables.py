"""The report on compiled kernels as CSV, one line each, and as a Markdown table of the largest."""

import csv
import io
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .resources import Row

BEGIN, END = "<!-- resource table: begin -->", "<!-- resource table: end -->"

HEADER = (
    "kernel", "target", "dtype", "activation", "config", "registers", "spilled", "shared",
    "instruction", "wide_copies", "narrow_copies", "tma_copies", "seconds", "problem",
)  # fmt: skip


def csv_table(rows: Sequence["Row"], header: Sequence[str] = HEADER) -> str:
    """A line per row, below `header`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(header)
    for row in rows:
        found = row.resources
        numbers: tuple[object, ...] = ("",) * 8
        if found:
            numbers = (
                found.registers, found.spilled_bytes, found.shared_bytes, found.instruction,
                found.wide_copies, found.narrow_copies, found.bulk_copies, f"{found.seconds:.1f}",
            )  # fmt: skip
        writer.writerow(
            (row.kernel, row.target, row.dtype, row.activation, row.config, *numbers, row.problem)
        )
    return text.getvalue()


def summary_table(rows: Sequence["Row"]) -> str:
    """A Markdown line per kernel, target and dtype: the most that any of its rows takes."""
    lines = [
        "| kernel | target | dtype | compiled | registers | spilled | shared | instruction |",
        "|---|---|---|--:|--:|--:|--:|---|",
    ]

    def key(row: "Row") -> tuple[str, str, str]:
        return row.kernel, row.target, row.dtype

    for (kernel, target, dtype), group in groupby(sorted(rows, key=key), key):
        members = list(group)
        found = [row.resources for row in members if row.resources]
        if not found:
            lines.append(f"| {kernel} | {target} | {dtype} | 0 of {len(members)} | | | | |")
            continue
        instructions = ", ".join(sorted({each.instruction for each in found}))
        lines.append(
            f"| {kernel} | {target} | {dtype} | {len(found)} "
            f"| {max(each.registers for each in found)} "
            f"| {max(each.spilled_bytes for each in found)} "
            f"| {max(each.shared_bytes for each in found)} | {instructions} |"
        )
    return "\n".join(lines) + "\n"


def replace_table(path: Path, table: str) -> None:
    """Put `table` between the two comments in the document at `path`.

    Raises:
        ValueError: if the document does not have both comments.
    """
    text = path.read_text("utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"--markdown: {path} has no lines {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n{table}{END}{after}", "utf-8")

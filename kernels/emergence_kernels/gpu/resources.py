"""Compile every kernel for GPUs that need not be there, and report what it takes of them.

    python -m emergence_kernels.gpu.resources --target sm_90 --dtype bf16

Registers, spilled bytes, shared memory and the matrix instruction of every kernel, as launched for
GPT-2's layer (H=768, F=3072, E=8). Exit code 1 if a configuration spills, does not fit, does not
compile, or misses Hopper's matrix instruction; 2 for flags that cannot be used.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import triton

from ..activations import Activation
from .compiling import CompileJob, Resources, compile_in_parallel
from .defaults import TARGETS
from .launch import Launch
from .recording import (
    BUCKETS,
    DTYPES,
    Case,
    H,
    candidate_launches,
    launches,
    product_of,
)
from .resource_tables import csv_table, replace_table, summary_table

Which = Literal["default", "all"]

TENSOR_MEMORY_COLUMNS = 512
"""Tensor memory of a multiprocessor from sm_100 on."""


@dataclass(frozen=True)
class Row:
    """One compiled kernel of the report."""

    kernel: str
    """Its name, and the product it computes where it serves several."""
    target: str
    dtype: str
    activation: str
    config: str
    """Tile, warps (w) and pipeline stages (s)."""
    resources: Resources | None
    """None if it did not compile."""
    problem: str
    """Why the configuration cannot be used; empty if it can."""


@dataclass(frozen=True)
class Compilation:
    """A row before its job has run."""

    case: Case
    launch: Launch
    job: CompileJob

    def row(self, outcome: Resources | str) -> Row:
        """The report on what came of it: resources, or the compiler's message."""
        return Row(
            kernel=self._name(),
            target=self.case.target.name,
            dtype=self.case.dtype_name,
            activation=self.case.activation,
            config=self._config(),
            resources=None if isinstance(outcome, str) else outcome,
            problem=outcome if isinstance(outcome, str) else self._problem(outcome),
        )

    def _name(self) -> str:
        name: str = self.launch.kernel.fn.__name__
        name = name.removeprefix("_").removesuffix("_kernel")
        product = product_of(self.launch)
        if product == "weight_grad":
            return f"{name} ({'w1' if self.launch.options['I'] == H else 'w2'})"
        return f"{name} ({product})" if name.startswith("row_product") else name

    def _config(self) -> str:
        options = self.launch.options
        blocks = "x".join(str(v) for k, v in options.items() if k.startswith("BLOCK"))
        words = [blocks, f"w{options['num_warps']}"]
        if "num_stages" in options:
            words.append(f"s{options['num_stages']}")
        words += [name.lower() for name in ("TMA", "SPECIALIZE") if options.get(name)]
        return " ".join(words)

    def _problem(self, found: Resources) -> str:
        target = self.case.target
        if found.spilled_bytes:
            return f"spills {found.spilled_bytes} bytes"
        if found.shared_bytes > target.shared_bytes:
            return f"takes {found.shared_bytes} of {target.shared_bytes} bytes of shared memory"
        if found.tensor_columns > TENSOR_MEMORY_COLUMNS:
            return f"takes {found.tensor_columns} of {TENSOR_MEMORY_COLUMNS} tensor memory columns"
        wanted = (
            product_of(self.launch) and self.case.bucket >= 64 and self.case.dtype.itemsize == 2
        )
        if wanted and target.name == "sm_90" and found.instruction != "wgmma":
            return f"computes with {found.instruction} instead of wgmma"
        return ""


def compilations(cases: Iterable[Case], which: Which) -> list[Compilation]:
    """Every different compilation that the cases need."""
    found: dict[str, Compilation] = {}
    for case in cases:
        recorded = (
            candidate_launches(case) if which == "all" else launches(case, case.default_plan())
        )
        for launch in recorded:
            job = CompileJob.of(launch, case.target)
            found.setdefault(job.key(), Compilation(case, launch, job))
    return list(found.values())


def compile_all(
    wanted: Sequence[Compilation], jobs: int, progress: Callable[[Row], None]
) -> list[Row]:
    """Compile in `jobs` processes; `progress` sees every row as soon as it is known."""
    rows = []
    outcomes = compile_in_parallel([compilation.job for compilation in wanted], jobs)
    for compilation, outcome in zip(wanted, outcomes, strict=True):
        rows.append(compilation.row(outcome))
        progress(rows[-1])
    return rows


def selected_cases(
    targets: Sequence[str],
    dtypes: Sequence[str],
    activations: Sequence[Activation],
    buckets: Sequence[int],
) -> list[Case]:
    """Every combination that exists: AMD has no tf32."""
    return [
        Case(TARGETS[target], dtype, activation, bucket)
        for target, dtype, activation, bucket in itertools.product(
            targets, dtypes, activations, buckets
        )
        if not (dtype == "tf32" and TARGETS[target].is_amd)
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m emergence_kernels.gpu.resources", description=__doc__.splitlines()[0]
    )
    for flag, choices in (
        ("--target", [*TARGETS]),
        ("--dtype", [*DTYPES]),
        ("--activation", [*get_args(Activation)]),
    ):
        parser.add_argument(
            flag, choices=choices, default=choices, nargs="+", metavar="NAME",
            help=f"some of {', '.join(choices)}; all unless given",
        )  # fmt: skip
    parser.add_argument(
        "--bucket", type=int, choices=BUCKETS, default=BUCKETS, nargs="+", metavar="ROWS",
        help="rows per expert",
    )  # fmt: skip
    parser.add_argument(
        "--configs", choices=("default", "all"), default="default",
        help="default configurations, or all that tuning may choose",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every row")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write every row")
    parser.add_argument(
        "--markdown", type=Path, metavar="PATH",
        help="replace the table between the file's two resource-table comments",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    return parser


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    flags = _parser().parse_args(argv)
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set, so nothing would be compiled: unset it")
    if flags.jobs < 1:
        raise ValueError(f"--jobs: got {flags.jobs}, needs at least 1")
    cases = selected_cases(flags.target, flags.dtype, flags.activation, flags.bucket)
    rows = compile_all(
        compilations(cases, flags.configs), flags.jobs, lambda row: _write(csv_table([row], ""))
    )
    if flags.json:
        flags.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), "utf-8")
    if flags.csv:
        flags.csv.write_text(csv_table(rows), "utf-8")
    if flags.markdown:
        replace_table(flags.markdown, summary_table(rows))
    problems = [row for row in rows if row.problem]
    _write(f"{len(rows)} compiled, {len(problems)} with a problem\n")
    return 1 if problems else 0


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as failure:
        sys.stderr.write(f"error: {failure}\n")
        sys.exit(2)

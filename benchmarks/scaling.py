"""Scaling study: how cost and memory grow with tokens, experts and experts per token.

`python -m benchmarks.scaling --out DIR` writes `scaling.json`; `benchmarks.report` draws it.
Each sweep varies one size and keeps the others. With T, F and K fixed the active FLOPs do not
depend on E, so an exponent of E above 0 is what more experts cost by themselves.
Letters: T tokens, E experts, K experts per token, F expert width.
"""

import argparse
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import add_common, common_environment, device_of, start_logging
from benchmarks.contestants import OURS
from benchmarks.layer import measure_layer
from benchmarks.results import Journal, Record, Row
from benchmarks.workloads import Case, Shape

logger = logging.getLogger(__name__)

CONTESTANTS = tuple(e for e in OURS if e.name in ("sequential", "grouped", "fused"))


@dataclass(frozen=True)
class Sweep:
    """One size varied: `base` with `field` set to each of `values`."""

    name: str
    field: str
    """The field of `Shape` that varies, and the key in a row's parameters."""
    values: tuple[int, ...]
    base: Shape

    def cases(self, dtype: str) -> list[Case]:
        """One case per value."""
        shapes = [
            replace(self.base, name=f"{self.name}={value}", **_one(self.field, value))
            for value in self.values
        ]
        return [Case(shape, "balanced", dtype) for shape in shapes]


def _one(name: str, value: int) -> dict[str, Any]:
    return {name: value}


@dataclass(frozen=True)
class Fit:
    """`y = c * x**exponent`, by least squares on logarithms."""

    exponent: float
    standard_error: float
    """Of the exponent; nan with fewer than three points."""
    log_constant: float

    def at(self, x: float) -> float:
        """The fitted value."""
        return math.exp(self.log_constant + self.exponent * math.log(x))


def fit_exponent(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Fit a power law to two or more positive points."""
    log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    centred = log_x - log_x.mean()
    spread = float((centred**2).sum())
    exponent = float((centred * log_y).sum()) / spread
    constant = float(log_y.mean() - exponent * log_x.mean())
    residuals = log_y - constant - exponent * log_x
    freedom = len(log_x) - 2
    variance = float((residuals**2).sum()) / freedom if freedom > 0 else math.nan
    return Fit(exponent, math.sqrt(variance / spread), constant)


def sweeps(device: str, *, tiny: bool = False) -> tuple[Sweep, ...]:
    """The three sweeps at sizes that suit `device`."""
    values: tuple[tuple[int, ...], ...]
    if tiny:
        base = Shape("tiny", 32, 16, 32, 4, 1, "smoke test")
        values = ((16, 32, 64), (2, 4, 8), (1, 2, 4))
    elif device == "cuda":
        base = Shape("gpu", 4096, 768, 3072, 8, 1, "GPT-2's layer")
        values = ((512, 1024, 2048, 4096, 8192, 16384, 32768), (4, 8, 16, 32, 64), (1, 2, 4, 8))
    else:
        base = Shape("cpu", 512, 256, 512, 8, 1, "small enough for two cores")
        values = ((128, 256, 512, 1024, 2048), (4, 8, 16, 32, 64), (1, 2, 4, 8))
    fields = ("tokens", "experts", "top_k")
    return tuple(
        Sweep(field, field, of_field, base) for field, of_field in zip(fields, values, strict=True)
    )


def measure_scaling(
    device: str,
    dtype: str,
    *,
    budget_s: float,
    deadline: float = math.inf,
    tiny: bool = False,
    on_rows: Record | None = None,
) -> list[Row]:
    """Rows of all sweeps: a full pass of each contestant at each size.

    Args:
        budget_s: seconds of timing for each size.
        deadline: `time.monotonic()` after which no further size is begun.
    """
    rows: list[Row] = []
    for sweep in sweeps(device, tiny=tiny):
        for case in sweep.cases(dtype):
            if time.monotonic() > deadline:
                logger.warning("out of time at %s", case.name)
                return rows
            found = measure_layer(
                case, device, budget_s=budget_s, entries=CONTESTANTS, phases=("full",)
            )
            marked = [
                replace(
                    row,
                    suite="scaling",
                    group=f"{sweep.name}/{dtype}",
                    parameters={**row.parameters, "sweep": sweep.field},
                )
                for row in found
            ]
            rows += marked
            if on_rows:
                on_rows(marked)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    add_common(parser)
    options = parser.parse_args(arguments)
    start_logging()
    device = device_of(options.device)
    journal = Journal(Path(options.out) / "scaling.json", common_environment(device))
    deadline = time.monotonic() + options.time_limit
    for dtype in options.dtype or ["fp32"]:
        measure_scaling(
            device,
            dtype,
            budget_s=options.budget,
            deadline=deadline,
            tiny=options.tiny,
            on_rows=journal.add,
        )
    logger.info("%d rows in %s", len(journal.rows), journal.path)


if __name__ == "__main__":
    main()

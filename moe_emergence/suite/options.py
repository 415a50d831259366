"""The options of `python -m moe_emergence.suite`, verb by verb."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moe_emergence.experiments.cluster import Cluster
from moe_emergence.experiments.description import MARGIN
from moe_emergence.settings import check


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """What every verb takes."""

    suite: Annotated[str, tyro.conf.Positional] = "demo"
    """Name of a built-in suite, or a .toml file of your own."""
    only: tuple[str, ...] = ()
    """Only these variants (and the bases they need)."""
    out: str | None = None
    """Folder of the suite; runs/suites/NAME without it."""
    debug: bool = False
    """Show the traceback of an error."""

    @property
    def root(self) -> Path:
        """The suite's folder."""
        return Path(self.out or Path("runs") / "suites" / Path(self.suite).stem)


@dataclass(frozen=True, kw_only=True)
class RunsOptions(SuiteOptions):
    """The runs of a suite, and what they may cost."""

    seeds: tuple[int, ...] = ()
    """Seeds in place of the suite's."""
    jobs: int = 1
    """Runs at a time; on a CPU they share its cores."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto is cuda where there is one."""
    base: str | None = None
    """Dense base in place of the suite's: a hub id or a folder."""
    data: str | None = None
    """Data in place of the suite's: "embedded", "hub" or a folder."""
    price_per_hour: float | None = None
    """Price of an hour of this machine, in any currency."""
    budget: float | None = None
    """Refuse a plan that costs more, in the currency of --price-per-hour."""

    def __post_init__(self) -> None:
        check(1 <= self.jobs <= 64, "--jobs", self.jobs, "give a number from 1 to 64")
        for flag, value in (("--price-per-hour", self.price_per_hour), ("--budget", self.budget)):
            check(value is None or value >= 0, flag, value, "give 0 or more")
        check(
            self.budget is None or self.price_per_hour is not None,
            "--budget",
            self.budget,
            "give --price-per-hour too",
        )


@dataclass(frozen=True, kw_only=True)
class PlanOptions(RunsOptions):
    """The runs of a suite, what they cost on this machine (from a short measured run of every
    architecture), and whether that is within the budget. With --gpus, in place of that: what a step
    of its mixtures would take on so many GPUs, predicted."""

    gpus: int = 1
    """GPUs to predict a step for; 1 predicts nothing and measures this machine."""
    ep: int | None = None
    """GPUs that share the experts of a layer; none compares all numbers there can be."""
    gpus_per_node: int = 8
    """GPUs that share a machine and its fast links."""

    def __post_init__(self) -> None:
        super().__post_init__()
        groups = Cluster(self.gpus, self.gpus_per_node).groups
        known = f"give one of {' '.join(map(str, groups))}, which share out --gpus ({self.gpus})"
        check(self.ep is None or self.ep in groups, "--ep", self.ep, known)
        check(
            self.price_per_hour is None or self.gpus == 1,
            "--price-per-hour",
            self.price_per_hour,
            "is for this machine; leave out either it or --gpus",
        )


@dataclass(frozen=True, kw_only=True)
class RunOptions(RunsOptions):
    """Execute what is missing, resume what was cut off, skip what is complete. Give the same
    command again after an interruption or a failure."""

    keep_models: bool = False
    """Keep checkpoints and models of complete runs (a suite has many)."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions(SuiteOptions):
    """Write report.md, figures and tables into the suite's folder, from its run folders alone."""

    margin: float = MARGIN
    """Nats per token within which two losses count as equivalent."""

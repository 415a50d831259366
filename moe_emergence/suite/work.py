"""`python -m moe_emergence.suite plan|run|report`: experiments that a referee would believe."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from moe_emergence.command import parse, run
from moe_emergence.errors import INTERRUPTED
from moe_emergence.experiments.cluster import Cluster
from moe_emergence.experiments.comparisons import MARGIN
from moe_emergence.experiments.estimate import estimate, estimate_table, refuse_over_budget
from moe_emergence.experiments.execute import Execution, execute, is_complete
from moe_emergence.experiments.parallel_plan import (
    compare,
    distinct_shapes,
    layout_table,
    verdict,
)
from moe_emergence.experiments.plan import PlannedRun, describe, plan_runs, variant_configs
from moe_emergence.experiments.report import build_report
from moe_emergence.experiments.suite_file import Suite, load_suite
from moe_emergence.run_folder import read_json, write_json
from moe_emergence.settings import check

PROG = "python -m moe_emergence.suite"


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


VERBS: dict[str, tuple[type[SuiteOptions], str]] = {
    "plan": (PlanOptions, "runs, steps, FLOPs, time and cost on this machine"),
    "run": (RunOptions, "do what is missing"),
    "report": (ReportOptions, "report.md, figures and tables from the run folders"),
}


def main(argv: list[str]) -> int:
    """Plan, run or report, as `argv[0]` says."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = "".join(f"  {name:<8}{text}\n" for name, (_, text) in VERBS.items())
        sys.stdout.write(f"usage: {PROG} VERB [SUITE] [OPTIONS]\n{lines}")
        return 0
    options = options_of(argv)
    if isinstance(options, RunOptions):
        return run_suite(options)
    if isinstance(options, PlanOptions):
        return plan(options)
    assert isinstance(options, ReportOptions)
    report = build_report(options.root, options.margin, only=options.only)
    Console().print(str(report), soft_wrap=True)
    return 0


def options_of(argv: list[str]) -> SuiteOptions:
    """The options of the verb `argv[0]`; `ValueError` for a verb or flags that cannot be used."""
    if argv[0] not in VERBS:
        raise ValueError(f"{PROG} {argv[0]}: choose from {', '.join(VERBS)}")
    return parse(VERBS[argv[0]][0], argv[1:], f"{PROG} {argv[0]}")


def plan(options: PlanOptions) -> int:
    """Print what the suite costs; `ValueError` when that is over the budget."""
    suite, runs = _planned(options)
    if options.gpus > 1:
        _print_layouts(options, suite)
    else:
        _print_estimate(options, runs)
    return 0


def run_suite(options: RunOptions) -> int:
    """Execute the plan; 1 when a run failed, `INTERRUPTED` when stopped."""
    suite, runs = _planned(options)
    if options.budget is not None:
        _print_estimate(options, runs)
    for planned in runs:
        is_complete(planned)  # refuses folders of other settings, before anything is written
    _write_description(describe(suite, _command(), _overrides(suite, options)), options.root)
    execution = Execution(options.root, options.jobs, _threads(options), options.keep_models)
    states = execute(runs, execution)
    counts = {name: sum(s.state == name for s in states) for name in {s.state for s in states}}
    summary = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    Console().print(f"{summary} of {len(states)} runs in {options.root}", soft_wrap=True)
    if "failed" in counts:
        return 1
    return 0 if set(counts) == {"complete"} else INTERRUPTED


def _write_description(described: dict[str, Any], root: Path) -> None:
    """`suite.json`, which keeps the seeds that were run before."""
    path = root / "suite.json"
    before = read_json(path) if path.exists() else {}
    if before.get("name") == described["name"]:
        seeds = dict.fromkeys([*before["seeds"], *described["seeds"]])
        described = described | {"seeds": list(seeds)}
    write_json(path, described)


def _planned(options: RunsOptions) -> tuple[Suite, list[PlannedRun]]:
    suite = load_suite(options.suite)
    if options.seeds:
        suite = replace(suite, seeds=tuple(dict.fromkeys(options.seeds)))
    runs = plan_runs(suite, options.root, _overrides(suite, options))
    names = [variant.name for variant in suite.variants]
    for name in options.only:
        check(name in names, "--only", name, f"choose from {', '.join(names)}")
    if options.only:
        runs = [run for run in runs if run.variant in (*options.only, "base")]
    return suite, runs


def _overrides(suite: Suite, options: RunsOptions) -> dict[str, Any]:
    """The settings of every run that the command line gives."""
    overrides: dict[str, Any] = {"device": options.device}
    if options.base is not None:
        check(suite.base is None, "--base", options.base, f"{suite.name} pretrains its own bases")
        overrides["model.base"] = options.base
    if options.data is not None:
        overrides["data.data"] = options.data
    return overrides


def _print_layouts(options: PlanOptions, suite: Suite) -> None:
    configs = variant_configs(suite, _overrides(suite, options))
    if options.only:
        configs = {name: configs[name] for name in options.only}
    cluster, console = Cluster(options.gpus, options.gpus_per_node), Console()
    shapes = distinct_shapes(configs)
    if not shapes:
        console.print("No variant has mixture layers.")
    for shape, names in shapes.items():
        layouts = compare(shape, cluster, options.ep)
        console.print(layout_table(names, shape, cluster, layouts))
        console.print(verdict(shape, cluster, layouts, options.ep) + "\n")


def _print_estimate(options: RunsOptions, runs: list[PlannedRun]) -> None:
    missing = [run for run in runs if not is_complete(run)]
    found = estimate(runs, missing, jobs=options.jobs, threads=_threads(options))
    Console().print(estimate_table(found, options.price_per_hour))
    refuse_over_budget(found, options.price_per_hour, options.budget)


def _threads(options: RunsOptions) -> int:
    """Of each process on a CPU, so that the processes share its cores; 0 for torch's own choice."""
    if options.jobs == 1 or (options.device != "cpu" and torch.cuda.is_available()):
        return 0
    return max(1, (os.cpu_count() or 1) // options.jobs)


def _command() -> list[str]:
    return ["python", "-m", "moe_emergence.suite", *sys.argv[1:]]


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))

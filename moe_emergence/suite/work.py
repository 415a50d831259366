"""Plan a suite, run it, and report what was found."""

import os
import signal
from pathlib import Path
from typing import Any

from moe_emergence.begin import begin
from moe_emergence.device import find_device
from moe_emergence.disk import clear_unfinished
from moe_emergence.experiments.cluster import Cluster
from moe_emergence.experiments.description import BASE
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
from moe_emergence.experiments.suite_file import Suite
from moe_emergence.interrupt import interrupted_code
from moe_emergence.run_folder import read_json, write_json
from moe_emergence.run_lock import locked
from moe_emergence.suite.options import PlanOptions, ReportOptions, RunOptions, RunsOptions
from moe_emergence.suite.verbs import overrides_of
from moe_emergence.terminal import Console


def plan(suite: Suite, options: PlanOptions) -> int:
    """Print what the suite costs; `ValueError` when that is over the budget."""
    begin()
    runs = _planned(suite, options)
    if options.gpus > 1:
        _print_layouts(options, suite)
    else:
        _print_estimate(options, runs)
    return 0


def run_suite(suite: Suite, options: RunOptions, command: list[str]) -> int:
    """Execute the plan, as `command` asked; 1 when a run failed, 128 + N for signal N."""
    begin()
    runs = _planned(suite, options)
    if options.budget is not None:
        _print_estimate(options, runs)
    for planned in runs:
        is_complete(planned)  # refuses folders of other settings, before anything is written
    with locked(options.root, f"--out {options.root}"):
        for folder in (options.root, options.root / "plans"):
            clear_unfinished(folder)
        _write_description(describe(suite, command, overrides_of(options)), options.root)
        execution = Execution(options.root, options.jobs, _threads(options), options.keep_models)
        states, stopped_by = execute(runs, execution)
    counts = {name: sum(s.state == name for s in states) for name in {s.state for s in states}}
    summary = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    Console().print(f"{summary} of {len(states)} runs in {options.root}", soft_wrap=True)
    if "failed" in counts:
        return 1
    if set(counts) == {"complete"}:
        return 0
    # without a signal to this process, those of a run were stopped one by one
    return interrupted_code(stopped_by or signal.SIGTERM)


def report(options: ReportOptions) -> int:
    """Write the report of what was run, and print it."""
    begin()
    written = build_report(options.root, options.margin, only=options.only)
    Console().print(str(written), soft_wrap=True)
    return 0


def _write_description(described: dict[str, Any], root: Path) -> None:
    """`suite.json`, which keeps the seeds that were run before."""
    path = root / "suite.json"
    before = read_json(path) if path.exists() else {}
    if before.get("name") == described["name"]:
        seeds = dict.fromkeys([*before["seeds"], *described["seeds"]])
        described = described | {"seeds": list(seeds)}
    write_json(path, described)


def _planned(suite: Suite, options: RunsOptions) -> list[PlannedRun]:
    runs = plan_runs(suite, options.root, overrides_of(options))
    return [run for run in runs if not options.only or run.variant in (*options.only, BASE)]


def _print_layouts(options: PlanOptions, suite: Suite) -> None:
    configs = variant_configs(suite, overrides_of(options))
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
    if options.jobs == 1 or find_device(options.device).type == "cuda":
        return 0
    return max(1, (os.cpu_count() or 1) // options.jobs)

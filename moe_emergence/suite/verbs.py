"""The verbs of `python -m moe_emergence.suite`: their options are read, then their work is done."""

import sys
from dataclasses import replace
from typing import Any

from moe_emergence.command import loading, parse
from moe_emergence.experiments.description import read_suite
from moe_emergence.experiments.suite_file import Suite, load_suite
from moe_emergence.experiments.variants import read_base, read_variants
from moe_emergence.settings import check, check_known
from moe_emergence.suite.options import (
    PlanOptions,
    ReportOptions,
    RunOptions,
    RunsOptions,
    SuiteOptions,
)

PROG = "python -m moe_emergence.suite"

VERBS: dict[str, tuple[type[SuiteOptions], str]] = {
    "plan": (PlanOptions, "runs, steps, FLOPs, time and cost on this machine"),
    "run": (RunOptions, "do what is missing"),
    "report": (ReportOptions, "report.md, figures and tables from the run folders"),
}


def answer(argv: list[str]) -> int:
    """Plan, run or report, as `argv[0]` says."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = "".join(f"  {name:<8}{text}\n" for name, (_, text) in VERBS.items())
        sys.stdout.write(f"usage: {PROG} VERB [SUITE] [OPTIONS]\n{lines}")
        return 0
    options = options_of(argv)
    if isinstance(options, ReportOptions):
        check_was_run(options)

        with loading():
            from moe_emergence.suite.work import report

        return report(options)
    assert isinstance(options, RunsOptions)
    suite = suite_of(options)

    with loading():
        from moe_emergence.suite.work import plan, run_suite

    if isinstance(options, RunOptions):
        return run_suite(suite, options, [*PROG.split(), *argv])
    assert isinstance(options, PlanOptions)
    return plan(suite, options)


def options_of(argv: list[str]) -> SuiteOptions:
    """The options of the verb `argv[0]`; `ValueError` for a verb or flags that cannot be used."""
    check_known(PROG, argv[0], VERBS)
    return parse(VERBS[argv[0]][0], argv[1:], f"{PROG} {argv[0]}")


def suite_of(options: RunsOptions) -> Suite:
    """The suite with the seeds asked for.

    Raises:
        ValueError: for a suite that is not there, that makes no sense, or that does not go with
            the options.
    """
    suite = load_suite(options.suite)
    check(
        options.base is None or suite.base is None,
        "--base",
        options.base,
        f"{suite.name} pretrains its own bases",
    )
    for name in options.only:
        check_known("--only", name, [variant.name for variant in suite.variants])
    overrides = overrides_of(options)
    read_base(suite, overrides)
    read_variants(suite, overrides)
    return replace(suite, seeds=tuple(dict.fromkeys(options.seeds)) or suite.seeds)


def check_was_run(options: ReportOptions) -> None:
    """Refuse to report what has not begun."""
    described = options.root / "suite.json"
    if described.exists():
        read_suite(options.root).only(options.only)
        return
    load_suite(options.suite)
    command = f"{PROG} run {options.suite}" + (f" --out {options.out}" if options.out else "")
    raise ValueError(f"{described}: nothing has been run there; run {command} first")


def overrides_of(options: RunsOptions) -> dict[str, Any]:
    """The settings of every run that the command line gives."""
    given = {"device": options.device, "model.base": options.base, "data.data": options.data}
    return {name: value for name, value in given.items() if value is not None}

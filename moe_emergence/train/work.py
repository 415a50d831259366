"""`python -m moe_emergence.train`: upcycle, train, evaluate and resume."""

import sys
from pathlib import Path

from moe_emergence.analysis.expert_domain import plot_expert_domain
from moe_emergence.analysis.figure_file import save
from moe_emergence.analysis.summary import print_comparison
from moe_emergence.command import parse, run
from moe_emergence.config import RunConfig
from moe_emergence.domain_fractions import read_domain_fractions
from moe_emergence.errors import INTERRUPTED
from moe_emergence.presets import get_preset
from moe_emergence.training.experiment import ExperimentResult, run_experiment
from moe_emergence.training.launch import start_missing_processes

PROG = "python -m moe_emergence.train"


def main(argv: list[str]) -> int:
    """Train as the flags say, starting from `--preset` (demo without one)."""
    start_missing_processes("moe_emergence.train", argv)
    config = parse(RunConfig, argv, PROG, default=get_preset(preset_name(argv)))
    result = run_experiment(config)
    if result.is_main_process:
        _report(config, result)
    return INTERRUPTED if result.stopped_by_signal else 0


def preset_name(argv: list[str]) -> str:
    """The last `--preset` on the command line; it decides the defaults of all other flags."""
    name = "demo"
    for place, argument in enumerate(argv):
        if argument == "--preset" and place + 1 < len(argv):
            name = argv[place + 1]
        elif argument.startswith("--preset="):
            name = argument.partition("=")[2]
    return name


def _report(config: RunConfig, result: ExperimentResult) -> None:
    folder = Path(config.output_dir) / config.run_name
    runs = {stage.role: stage.run for stage in result.stages}
    tables = {role: run.expert_domain for role, run in runs.items() if run.expert_domain.exists()}
    if "moe" in tables:
        titles = {"moe": config.run_name, "null": "random router, never trained"}
        found = {titles[role]: read_domain_fractions(table) for role, table in tables.items()}
        save(plot_expert_domain(found), tables["moe"].with_suffix(".png"), dpi=150)
    print_comparison(runs, result.status, folder)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))

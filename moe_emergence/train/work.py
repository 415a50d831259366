"""Train as the settings say, and show what came of it."""

import logging
import sys
from pathlib import Path

from moe_emergence.analysis.expert_domain import plot_expert_domain
from moe_emergence.analysis.figure_file import save
from moe_emergence.analysis.summary import print_comparison
from moe_emergence.begin import begin
from moe_emergence.config import RunConfig
from moe_emergence.domain_fractions import read_domain_fractions
from moe_emergence.interrupt import interrupted_code
from moe_emergence.run_folder import RunFolder
from moe_emergence.training.experiment import ExperimentResult, run_experiment
from moe_emergence.training.memory import explained
from moe_emergence.training.next_commands import commands_to_look, resume_command

logger = logging.getLogger(__name__)


def train(config: RunConfig, argv: list[str]) -> int:
    """Train, or go on with it; the code of the signal when one stopped it.

    `argv` is what was typed, for the command that goes on.
    """
    try:
        begin()
        with explained():
            result = run_experiment(config)
        if result.is_main_process:
            _report(config, result, argv)
    except KeyboardInterrupt:
        logger.warning("to go on: %s", resume_command(argv))
        raise
    return interrupted_code(result.stopped_by_signal) if result.stopped_by_signal else 0


def _report(config: RunConfig, result: ExperimentResult, argv: list[str]) -> None:
    folder = Path(config.output_dir) / config.run_name
    runs = {stage.role: stage.run for stage in result.stages}
    tables = {role: run.expert_domain for role, run in runs.items() if run.expert_domain.exists()}
    if "moe" in tables:
        titles = {"moe": config.run_name, "null": "random router, never trained"}
        found = {titles[role]: read_domain_fractions(table) for role, table in tables.items()}
        save(plot_expert_domain(found), tables["moe"].with_suffix(".png"), dpi=150)
    print_comparison(runs, result.status, folder)
    interrupted = result.status == "interrupted"
    look = commands_to_look(RunFolder(folder), is_mixture=bool(config.model.moe_layers))
    commands = [resume_command(argv)] if interrupted else look
    lines = ["to go on:" if interrupted else "next:", *(f"  {command}" for command in commands)]
    # whole lines, to be copied
    sys.stdout.write("\n".join(lines) + "\n")

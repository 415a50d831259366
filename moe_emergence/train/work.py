"""Train as the settings say, and show what came of it."""

from pathlib import Path

from moe_emergence.analysis.expert_domain import plot_expert_domain
from moe_emergence.analysis.figure_file import save
from moe_emergence.analysis.summary import print_comparison
from moe_emergence.begin import begin
from moe_emergence.config import RunConfig
from moe_emergence.domain_fractions import read_domain_fractions
from moe_emergence.errors import INTERRUPTED
from moe_emergence.training.experiment import ExperimentResult, run_experiment


def train(config: RunConfig) -> int:
    """Train, or go on with it; `INTERRUPTED` when a signal stopped it."""
    begin()
    result = run_experiment(config)
    if result.is_main_process:
        _report(config, result)
    return INTERRUPTED if result.stopped_by_signal else 0


def _report(config: RunConfig, result: ExperimentResult) -> None:
    folder = Path(config.output_dir) / config.run_name
    runs = {stage.role: stage.run for stage in result.stages}
    tables = {role: run.expert_domain for role, run in runs.items() if run.expert_domain.exists()}
    if "moe" in tables:
        titles = {"moe": config.run_name, "null": "random router, never trained"}
        found = {titles[role]: read_domain_fractions(table) for role, table in tables.items()}
        save(plot_expert_domain(found), tables["moe"].with_suffix(".png"), dpi=150)
    print_comparison(runs, result.status, folder)

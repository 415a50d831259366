"""The table a person reads when a run has ended, made from the run folders alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_emergence.config import DOMAINS
from moe_emergence.run_folder import RunFolder, read_json, read_metrics

_TITLES = {"base": "dense base", "moe": "mixture of experts", "dense": "dense, trained on"}


def last_evaluation(run: RunFolder) -> dict[str, Any] | None:
    """The newest `metrics.jsonl` row with an evaluation, if there is one."""
    rows = read_metrics(run.metrics) if run.metrics.exists() else []
    return next((row for row in reversed(rows) if "eval/lm_loss" in row), None)


def comparison_table(runs: Mapping[str, RunFolder]) -> Table:
    """Evaluation lm_loss (nats per token) per domain of every run, and MoE minus dense.

    The difference is shown only where both were evaluated at the same step.
    """
    table = Table(title="Evaluation lm_loss, nats per token (auxiliary losses not included)")
    table.add_column("model")
    for column in ("step", *DOMAINS, "all", "tokens/s"):
        table.add_column(column, justify="right")
    keys = [*(f"eval/lm_loss_{domain}" for domain in DOMAINS), "eval/lm_loss"]
    rows = {role: last_evaluation(run) for role, run in runs.items()}
    for role, row in rows.items():
        if row is not None:
            losses = [f"{row[key]:.4f}" for key in keys]
            table.add_row(_TITLES[role], str(row["step"]), *losses, _speed(runs[role]))
    moe, dense = rows.get("moe"), rows.get("dense")
    if moe is not None and dense is not None and moe["step"] == dense["step"]:
        table.add_section()
        gaps = [f"{moe[key] - dense[key]:+.4f}" for key in keys]
        table.add_row("mixture minus dense", str(moe["step"]), *gaps, "")
    return table


def print_comparison(runs: Mapping[str, RunFolder], status: str, place: Path) -> None:
    """Print how it ended, the comparison table and where everything is, to stdout."""
    console = Console(markup=False, highlight=False)
    console.print(comparison_table(runs))
    console.print(f"status: {status}; everything is in {place}", soft_wrap=True)


def _speed(run: RunFolder) -> str:
    return f"{read_json(run.summary)['tokens_per_sec']:,.0f}" if run.summary.exists() else ""

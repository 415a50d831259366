"""The table a person reads when a run has ended, made from the run folders alone."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from moe_emergence.analysis.information import mutual_information
from moe_emergence.config.data import ALL
from moe_emergence.domain_fractions import read_domain_fractions
from moe_emergence.run_folder import (
    STAGES,
    RunFolder,
    losses_by_domain,
    read_config,
    read_json,
    read_metrics,
)
from moe_emergence.terminal import Console


def last_evaluation(run: RunFolder) -> dict[str, Any] | None:
    """The newest `metrics.jsonl` row with an evaluation, if there is one."""
    rows = read_metrics(run.metrics) if run.metrics.exists() else []
    return next((row for row in reversed(rows) if "eval/lm_loss" in row), None)


def comparison_table(runs: Mapping[str, RunFolder]) -> Table:
    """Evaluation lm_loss (nats per token) per domain of every run, and the mixture's minus others'.

    A difference is shown only where both were evaluated at the same step.
    """
    rows = {role: row for role, run in runs.items() if (row := last_evaluation(run)) is not None}
    domains = list(dict.fromkeys(d for row in rows.values() for d in losses_by_domain(row)))
    keys = {domain: f"eval/lm_loss_{domain}" for domain in domains} | {ALL: "eval/lm_loss"}
    columns = {
        STAGES[role]: [
            str(row["step"]),
            *(f"{row[k]:.4f}" for k in keys.values()),
            _speed(runs[role]),
        ]
        for role, row in rows.items()
    }
    for role, title in (("dense", "mixture - dense"), ("null", "mixture - random")):
        moe, other = rows.get("moe"), rows.get(role)
        if moe is not None and other is not None and moe["step"] == other["step"]:
            gaps = [f"{moe[key] - other[key]:+.4f}" for key in keys.values()]
            columns[title] = [str(moe["step"]), *gaps, ""]
    table = Table(
        title="Evaluation lm_loss, nats per token (auxiliary losses not included)",
        caption=_evaluated_on(next(iter(runs.values()))),
    )
    table.add_column("")
    for title in columns:
        table.add_column(title, justify="right")
    for name, *cells in zip(("step", *keys, "tokens/s"), *columns.values(), strict=True):
        table.add_row(name, *cells)
    return table


def _evaluated_on(run: RunFolder) -> str | None:
    """What the losses are of, since analyze reads more and gives another one."""
    blocks = read_config(run.config).monitor.eval_blocks if run.config.is_file() else 0
    if not blocks:
        return None
    return f"of {blocks} blocks of each domain (--eval-blocks); analyze reads up to --max-tokens"


def domain_bits(run: RunFolder) -> list[float]:
    """I(expert; domain) in bits for every mixture layer at the last evaluation, domains alike."""
    fractions = read_domain_fractions(run.expert_domain)
    return [float(mutual_information(list(of.values()))) for of in fractions.values()]


def what_was_shown(runs: Mapping[str, RunFolder]) -> str:
    """What the mixture's experts know of the domain and what it gains, beside a random router's."""
    domains = len(next(iter(read_domain_fractions(runs["moe"].expert_domain).values())))
    if domains < 2:
        return "One domain: whether experts know domains takes two (--data, --domains)."
    most = math.log2(domains)
    bits = {role: _listed(domain_bits(runs[role])) for role in ("moe", "null")}
    return (
        f"Knowing the expert tells {bits['moe']} of {most:.2f} bits of a token's domain (layer by "
        f"layer); a random router's {bits['null']}. {_worth(runs)}That is one seed: "
        "whether a difference holds, a suite says; whether a domain needs its experts, "
        "analyze --test modules."
    )


def _worth(runs: Mapping[str, RunFolder]) -> str:
    """Nothing is said of two runs that were not evaluated at the same step."""
    moe, null = last_evaluation(runs["moe"]), last_evaluation(runs["null"])
    if moe is None or null is None or moe["step"] != null["step"]:
        return ""
    gap = moe["eval/lm_loss"] - null["eval/lm_loss"]
    if gap < 0:
        return f"In loss that routing is worth {-gap:.4f} nats over random. "
    return f"In loss that routing is worth nothing over random ({gap:+.4f} nats). "


def _listed(bits: list[float]) -> str:
    return ", ".join(f"{one:.2f}" for one in bits)


def print_comparison(runs: Mapping[str, RunFolder], status: str, place: Path) -> None:
    """Print how it ended, the comparison table and where everything is, to stdout."""
    console = Console(markup=False, highlight=False)
    console.print(comparison_table(runs))
    if all(role in runs and runs[role].expert_domain.exists() for role in ("moe", "null")):
        console.print(what_was_shown(runs))
    console.print(f"status: {status}; everything is in {place}", soft_wrap=True)


def _speed(run: RunFolder) -> str:
    return f"{read_json(run.summary)['tokens_per_sec']:,.0f}" if run.summary.exists() else ""

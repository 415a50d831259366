"""From a suite's run folders to tidy tables; what is missing or broken is a row, not a gap."""

import re
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moe_emergence.config.data import ALL
from moe_emergence.csv_cells import read_csv
from moe_emergence.data.manifest import entry
from moe_emergence.experiments.description import BASE, SuiteFolder
from moe_emergence.run_folder import RunFolder, losses_by_domain, read_json, read_metrics
from moe_emergence.settings import from_dict
from moe_emergence.training.trainer import RunSummary

_FRACTION = re.compile(r"router/layer_(\d+)_expert_(\d+)_frac")
_CHURN = re.compile(r"eval/layer_(\d+)_churn")
_ENTROPY = re.compile(r"router/layer_(\d+)_entropy")

ENDED = ("completed", "collapsed")
"""Statuses that end a run for good."""

RUN_COLUMNS = (
    "variant", "seed", "status", "final_step", "max_steps", "tokens_per_sec", "wall_seconds",
    "problem",
)  # fmt: skip
LOSS_COLUMNS = ("variant", "seed", "step", "domain", "lm_loss")
FRACTION_COLUMNS = ("variant", "seed", "step", "layer", "expert", "fraction")
ENTROPY_COLUMNS = ("variant", "seed", "step", "layer", "entropy")
CHURN_COLUMNS = ("variant", "seed", "step", "layer", "churn")
FINAL_COLUMNS = (
    "variant", "seed", "domain", "final_step", "final_lm_loss", "best_step", "best_lm_loss"
)  # fmt: skip


@dataclass(frozen=True)
class Records:
    """Everything the run folders of a suite say; losses in nats per token."""

    suite: SuiteFolder
    runs: pd.DataFrame
    """One row per variant and seed, the base and runs that do not exist included: `RUN_COLUMNS`.
    `status` is that of the summary, "unfinished" (no summary), "unreadable" or "missing"."""
    losses: pd.DataFrame
    """`LOSS_COLUMNS`, every evaluation."""
    fractions: pd.DataFrame
    """`FRACTION_COLUMNS`: shares of a layer's assignments in a training step."""
    entropies: pd.DataFrame
    """`ENTROPY_COLUMNS`: mean entropy of the clean router probabilities, nats."""
    churn: pd.DataFrame
    """`CHURN_COLUMNS`: share of a fixed text's tokens with another expert than at the evaluation
    before."""
    modules: pd.DataFrame
    """variant, seed, and the columns of `analysis.modules`; empty where none were tested."""
    configs: dict[tuple[str, int], dict[str, Any]]
    """By variant and seed, where there is one."""
    manifests: dict[tuple[str, int], dict[str, Any]]
    environments: dict[tuple[str, int], dict[str, Any]]

    def setting(self, variant: str, seed: int, dotted: str) -> Any:
        """A field of a run's configuration, for example `model.top_k`; None where unknown."""
        found: Any = self.configs.get((variant, seed))
        for name in dotted.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        return found

    @property
    def domains(self) -> tuple[str, ...]:
        """Those that any run was evaluated on, in the order of the runs'."""
        return tuple(domain for domain in dict.fromkeys(self.losses["domain"]) if domain != ALL)

    def status(self, variant: str, seed: int) -> str:
        """Of one run, as in `runs`."""
        here = (self.runs["variant"] == variant) & (self.runs["seed"] == seed)
        return str(self.runs.loc[here, "status"].iloc[0]) if here.any() else "missing"


def collect(suite: SuiteFolder) -> Records:
    """Read every run folder of the suite."""
    runs: list[dict[str, Any]] = []
    losses: list[tuple[Any, ...]] = []
    fractions: list[tuple[Any, ...]] = []
    entropies: list[tuple[Any, ...]] = []
    churn: list[tuple[Any, ...]] = []
    modules: list[pd.DataFrame] = []
    configs: dict[tuple[str, int], dict[str, Any]] = {}
    manifests: dict[tuple[str, int], dict[str, Any]] = {}
    environments: dict[tuple[str, int], dict[str, Any]] = {}
    has_base = (suite.root / BASE).is_dir()
    for variant in [*([BASE] if has_base else []), *(v.name for v in suite.variants)]:
        for seed in suite.seeds:
            key = variant, seed
            run = suite.run(variant, seed)
            row: dict[str, Any] = {"variant": variant, "seed": seed, "problem": ""}
            runs.append(row)
            try:
                row |= _summary(run)
                for path, found in (
                    (run.config, configs),
                    (run.data_manifest, manifests),
                    (run.environment, environments),
                ):
                    if path.exists():
                        found[key] = read_json(path)
                metrics = read_metrics(run.metrics) if run.metrics.exists() else []
                for measured in metrics:
                    _sort_row(key, measured, losses, fractions, entropies, churn)
                if run.modules.exists():
                    table = read_csv(run.modules)
                    modules.append(table.assign(variant=variant, seed=seed))
            except (ValueError, KeyError, TypeError, OSError) as error:
                row |= {"status": "unreadable", "problem": str(error)}
            steps = entry(configs.get(key, {}), ("optim", "max_steps"))
            row["max_steps"] = steps if isinstance(steps, int) else None
    return Records(
        suite,
        pd.DataFrame(runs, columns=list(RUN_COLUMNS)),
        pd.DataFrame(losses, columns=list(LOSS_COLUMNS)),
        pd.DataFrame(fractions, columns=list(FRACTION_COLUMNS)),
        pd.DataFrame(entropies, columns=list(ENTROPY_COLUMNS)),
        pd.DataFrame(churn, columns=list(CHURN_COLUMNS)),
        pd.concat(modules, ignore_index=True) if modules else pd.DataFrame(),
        configs,
        manifests,
        environments,
    )


def _summary(run: RunFolder) -> dict[str, Any]:
    """How the run ended, or why that is not known."""
    if not run.exists:
        return {"status": "missing", "problem": "no run folder"}
    if not run.summary.exists():
        return {"status": "unfinished", "problem": "no run_summary.json"}
    summary = vars(from_dict(RunSummary, read_json(run.summary)))
    return {name: value for name, value in summary.items() if name != "best_eval_lm_loss"}


def _sort_row(
    key: tuple[str, int],
    row: dict[str, Any],
    losses: list[tuple[Any, ...]],
    fractions: list[tuple[Any, ...]],
    entropies: list[tuple[Any, ...]],
    churn: list[tuple[Any, ...]],
) -> None:
    """Put what a row of `metrics.jsonl` measured where it belongs."""
    if "eval/lm_loss" in row:
        by_domain = {ALL: row["eval/lm_loss"]} | losses_by_domain(row)
        losses += [(*key, row["step"], domain, value) for domain, value in by_domain.items()]
    for name, value in row.items():
        if match := _FRACTION.fullmatch(name):
            fractions.append((*key, row["step"], int(match[1]), int(match[2]), value))
        elif match := _ENTROPY.fullmatch(name):
            entropies.append((*key, row["step"], int(match[1]), value))
        elif match := _CHURN.fullmatch(name):
            churn.append((*key, row["step"], int(match[1]), value))


def final_losses(records: Records) -> pd.DataFrame:
    """Last and lowest evaluation lm_loss per variant, seed and domain: `FINAL_COLUMNS`.

    The best step is that of the lowest loss over all tokens, for every domain alike.
    """
    rows = []
    for (variant, seed), run in records.losses.groupby(["variant", "seed"], sort=False):
        table = run.drop_duplicates(["step", "domain"], keep="last").pivot(
            index="step", columns="domain", values="lm_loss"
        )
        last = table.index.max()
        best = table[ALL].idxmin() if ALL in table else last
        for domain in table.columns:
            rows.append(
                (variant, seed, domain, last, table.at[last, domain], best, table.at[best, domain])
            )
    return pd.DataFrame(rows, columns=list(FINAL_COLUMNS))

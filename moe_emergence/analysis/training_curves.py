"""Training curves of runs from their metrics, as tidy tables."""

import re
from pathlib import Path
from typing import Any

import pandas as pd

from moe_emergence.run_folder import read_metrics

_LOAD = re.compile(r"router/layer_(\d+)_expert_(\d+)_frac")
_ENTROPY = re.compile(r"router/layer_(\d+)_entropy")


def training_tables(metrics: Path) -> dict[str, pd.DataFrame]:
    """Tables from a run's `metrics.jsonl` (docs/contract.md) or a Trainer's `routing.jsonl`.

    `training`: step, metric, value. `load_over_training`: step, layer, expert, fraction.
    `entropy_over_training`: step, layer, entropy (nats). `collapse`: step, layer, largest_share,
    max_violation. Empty where the run has none.
    """
    training: list[dict[str, Any]] = []
    loads: list[dict[str, Any]] = []
    entropies: list[dict[str, Any]] = []
    for row in read_metrics(metrics) if metrics.is_file() else []:
        step = row["step"]
        for name, value in row.items():
            if name == "step" or not isinstance(value, (int, float)):
                continue
            load, entropy = _LOAD.fullmatch(name), _ENTROPY.fullmatch(name)
            if load:
                layer, expert = int(load[1]), int(load[2])
                loads.append({"step": step, "layer": layer, "expert": expert, "fraction": value})
            elif entropy:
                entropies.append({"step": step, "layer": int(entropy[1]), "entropy": value})
            else:
                training.append({"step": step, "metric": name, "value": float(value)})
    load_table = pd.DataFrame(loads)
    return {
        "training": pd.DataFrame(training),
        "load_over_training": load_table,
        "entropy_over_training": pd.DataFrame(entropies),
        "collapse": collapse_table(load_table),
    }


def collapse_table(loads: pd.DataFrame) -> pd.DataFrame:
    """step, layer, largest_share, max_violation (largest load over the mean load, less 1)."""
    if loads.empty:
        return pd.DataFrame()
    grouped = loads.groupby(["step", "layer"])["fraction"]
    table = grouped.max().rename("largest_share").reset_index()
    table["max_violation"] = table["largest_share"] * grouped.count().to_numpy() - 1
    return table

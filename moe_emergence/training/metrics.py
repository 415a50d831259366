"""From the measurements of a step to a row of `metrics.jsonl`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_emergence.training.step import StepStatistics


@dataclass(frozen=True)
class StepRecord:
    """What a step measured, still on the device."""

    step: int
    sums: StepStatistics
    grad_norm: Tensor
    learning_rate: float
    noise_std: float | None
    """None for a dense model."""


def step_row(
    record: StepRecord, domains: Sequence[str], router_layers: Sequence[int] = ()
) -> dict[str, Any]:
    """The row of one step, with router metrics for the mixture layers in `router_layers`."""
    sums = record.sums
    row: dict[str, Any] = {
        "step": record.step,
        "train/lm_loss": float(sums.lm_loss),
        "train/grad_norm": float(record.grad_norm),
        "train/learning_rate": record.learning_rate,
    }
    if record.noise_std is not None:
        row["train/lb_loss"] = float(sums.lb_loss)
        row["train/z_loss"] = float(sums.z_loss)
        row["train/noise_std"] = record.noise_std
    if sums.routing_variance.numel():
        row["train/routing_variance"] = float(sums.routing_variance)
    losses = zip(domains, sums.domain_loss_D.tolist(), sums.domain_rows_D.tolist(), strict=True)
    row |= {f"train/lm_loss_{domain}": loss / rows for domain, loss, rows in losses if rows}
    if router_layers:
        row |= router_metrics(router_layers, sums.expert_counts_NE, sums.entropy_N)
    return row


def router_metrics(
    layers: Sequence[int], expert_counts_NE: Tensor, entropy_N: Tensor
) -> dict[str, float]:
    """Every expert's share of its layer's assignments, and every layer's mean entropy in nats."""
    row: dict[str, float] = {}
    fractions_NE = expert_counts_NE / expert_counts_NE.sum(dim=1, keepdim=True)
    for layer, fractions, entropy in zip(
        layers, fractions_NE.tolist(), entropy_N.tolist(), strict=True
    ):
        row |= {f"router/layer_{layer}_expert_{e}_frac": f for e, f in enumerate(fractions)}
        row[f"router/layer_{layer}_entropy"] = entropy
    return row


def check_finite(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
    """The rows before the first one with a loss or gradient norm that is not finite, and why."""
    for place, row in enumerate(rows):
        for key, value in row.items():
            if key.startswith("train/") and not math.isfinite(value):
                return rows[:place], f"{key} is {value} at step {row['step']}"
    return rows, None

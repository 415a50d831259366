"""What a plan costs on this machine: steps of every architecture are timed, the rest is arithmetic.

Evaluation is charged as a third of training per token (a forward pass without the backward one).
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM

from moe_emergence.config import SHIPPED, RunConfig
from moe_emergence.data.loader import StepBatch
from moe_emergence.experiments.flops import base_config, training_flops
from moe_emergence.experiments.plan import PlannedRun
from moe_emergence.models import MixtureModel, upcycle
from moe_emergence.models.loading import LanguageModel
from moe_emergence.models.lower_layers import freeze_lower_layers
from moe_emergence.moe import RouterNoise
from moe_emergence.progress import progress_bar
from moe_emergence.settings import to_dict
from moe_emergence.training.environment import make_accelerator
from moe_emergence.training.graph import dispatch_of, make_update
from moe_emergence.training.memory import keep_freed_memory
from moe_emergence.training.objective import NextTokenLoss
from moe_emergence.training.operators import use_fast_operators
from moe_emergence.training.schedules import Rates, build_optimizer
from moe_emergence.training.trainer import tokens_per_step
from moe_emergence.training.update import Update

logger = logging.getLogger(__name__)

_EVAL_SHARE = 0.05
"""Of the tokens that are for evaluation; see `data/split.py`."""
_BYTES_PER_TOKEN = 3.5
"""Assumed where all evaluation blocks are used."""


@dataclass(frozen=True)
class VariantCost:
    """What the runs of a variant cost."""

    variant: str
    runs: int
    """Planned."""
    missing: int
    """Not complete yet: only these cost time."""
    steps: int
    """Of one run."""
    tokens: int
    """Of one run."""
    flops: float
    """Of one run."""
    step_seconds: float
    """Measured."""
    run_seconds: float
    """Steps and evaluations of one run."""


@dataclass(frozen=True)
class Estimate:
    """What a plan costs."""

    device: str
    jobs: int
    variants: tuple[VariantCost, ...]

    @property
    def hours(self) -> float:
        """Until all missing runs are complete, if runs side by side did not slow each other."""
        total = sum(cost.missing * cost.run_seconds for cost in self.variants)
        return total / self.jobs / 3600


def estimate(
    runs: Sequence[PlannedRun],
    missing: Sequence[PlannedRun],
    *,
    jobs: int,
    threads: int,
    seconds: float = 3.0,
) -> Estimate:
    """Time some steps of every architecture among `missing` and add up.

    Args:
        runs: all of the plan.
        missing: those that are not complete.
        jobs: runs at a time.
        threads: of each on a CPU, 0 for torch's own choice.
        seconds: to time the steps of one architecture for.
    """
    by_variant: dict[str, list[PlannedRun]] = {}
    for planned in runs:
        by_variant.setdefault(planned.variant, []).append(planned)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    timed: dict[str, float] = {}
    costs = []
    try:
        with progress_bar("timing steps", len(by_variant)) as advance:
            for name, planned_runs in by_variant.items():
                config = _from_what_there_is(planned_runs[0].config, runs)
                left = sum(planned in missing for planned in planned_runs)
                key = _architecture(config)
                if left and key not in timed:
                    timed[key] = time_step(config, seconds)
                costs.append(_cost(name, config, len(planned_runs), left, timed.get(key, 0.0)))
                advance(1)
    finally:
        torch.set_num_threads(before)
    device = make_accelerator(runs[0].config).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Estimate(name, jobs, tuple(costs))


def _from_what_there_is(config: RunConfig, runs: Sequence[PlannedRun]) -> RunConfig:
    """With what the plan's own base starts from in its place: it has the same shape."""
    for planned in runs:
        origin = planned.config.model.base
        if str(planned.run.final_model) == config.model.base and origin != "scratch":
            return replace(config, model=replace(config.model, base=origin))
    return config


def _architecture(config: RunConfig) -> str:
    """All that the time of a step depends on."""
    values = to_dict(config)
    optim = {name: values["optim"][name] for name in ("batch_size", "grad_accum_steps")}
    optim |= {name: values["optim"][name] for name in ("balance_scope", "precision")}
    base = base_config(config).to_dict()
    return json.dumps([values["model"] | {"base": base}, config.data.block_size, optim])


def _cost(
    name: str, config: RunConfig, runs: int, missing: int, step_seconds: float
) -> VariantCost:
    steps, per_step = config.optim.max_steps, tokens_per_step(config, 1)
    per_domain = config.monitor.eval_blocks * config.data.block_size
    if not per_domain:
        per_domain = int(_EVAL_SHARE * config.data.size_mb * 1e6 / _BYTES_PER_TOKEN)
    evaluations = 2 + (steps - 1) // config.monitor.eval_every
    evaluated = evaluations * per_domain * (len(config.data.domains) or len(SHIPPED)) / per_step / 3
    return VariantCost(
        name,
        runs,
        missing,
        steps,
        steps * per_step,
        training_flops(config),
        step_seconds,
        step_seconds * (steps + evaluated),
    )


def time_step(config: RunConfig, budget_s: float) -> float:
    """Median seconds of an optimizer step of this configuration, on random weights and tokens.

    Steps are timed for `budget_s` seconds, at least one of them, after a first that is not counted.
    """
    accelerator = make_accelerator(config)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    language_model = _random_model(config).train()
    if isinstance(language_model, MixtureModel):
        language_model.set_dispatch(dispatch_of(config, accelerator))
    use_fast_operators(language_model, accelerator.device, accelerator.mixed_precision)
    first = config.model.frozen_layers
    freeze_lower_layers(language_model, first)
    width = language_model.config.hidden_size
    # in place of what would be read from the disk
    lower = (lambda ids: torch.zeros(*ids.shape, width, device=ids.device)) if first else None
    optimizer = build_optimizer(language_model, config.optim)
    objective = NextTokenLoss(language_model, first, lower)
    model, optimizer = accelerator.prepare(objective, optimizer)
    optim, length = config.optim, config.data.block_size
    update = make_update(Update(accelerator, model, optimizer, optim), config)
    shape = (optim.grad_accum_steps, optim.batch_size)
    ids = torch.randint(
        language_model.config.vocab_size, (*shape, length), device=accelerator.device
    )
    batch = StepBatch(ids, torch.ones(*shape, 1, dtype=torch.float64, device=ids.device))
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < 2 or time.perf_counter() - began < budget_s:
        start = time.perf_counter()
        noise = RouterNoise(optim.noise_std, 0, len(seconds)) if config.model.moe_layers else None
        update(batch, noise, Rates.at(0, optim))
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    accelerator.free_memory()
    return float(torch.tensor(seconds[1:]).median())


def _random_model(config: RunConfig) -> LanguageModel:
    model = config.model
    dense: LanguageModel = AutoModelForCausalLM.from_config(base_config(config))
    if not model.moe_layers:
        return dense
    return upcycle(
        dense,
        model.moe_layers,
        model.num_experts,
        model.top_k,
        router=model.router,
        top1_weight=model.top1_weight,
        use_expert_bias=model.expert_bias_rate > 0,
        pool_size=model.pool_size,
    )


def estimate_table(found: Estimate, price_per_hour: float | None) -> Table:
    """The estimate for a terminal."""
    hours = found.hours
    kind = "CPU-hours" if found.device == "CPU" else "GPU-hours"
    title = f"{hours:.2f} {kind} on {found.device}, {found.jobs} at a time"
    if price_per_hour is not None:
        title += f": {hours * price_per_hour:.2f} at {price_per_hour:g} an hour"
    columns = ("runs", "to do", "steps", "tokens", "TFLOPs", "ms/step", "min/run")
    table = Table(title=title, title_justify="left")
    table.add_column("variant", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for cost in found.variants:
        table.add_row(
            cost.variant,
            str(cost.runs),
            str(cost.missing),
            f"{cost.steps:,}",
            f"{cost.tokens:,}",
            f"{cost.flops / 1e12:,.1f}",
            f"{1000 * cost.step_seconds:,.0f}" if cost.missing else "-",
            f"{cost.run_seconds / 60:.1f}" if cost.missing else "-",
        )
    total = [replace(c, steps=c.steps * c.runs, tokens=c.tokens * c.runs) for c in found.variants]
    table.add_section()
    table.add_row(
        "all",
        str(sum(c.runs for c in total)),
        str(sum(c.missing for c in total)),
        f"{sum(c.steps for c in total):,}",
        f"{sum(c.tokens for c in total):,}",
        f"{sum(c.flops * c.runs for c in total) / 1e12:,.1f}",
        "",
        f"{sum(c.missing * c.run_seconds for c in total) / 60:.1f}",
    )
    return table


def refuse_over_budget(found: Estimate, price_per_hour: float | None, budget: float | None) -> None:
    """Raise `ValueError` when the missing runs cost more than the budget."""
    if budget is None or price_per_hour is None:
        return
    cost = found.hours * price_per_hour
    if cost > budget:
        raise ValueError(
            f"--budget {budget:g}: the runs to do cost {cost:.2f} ({found.hours:.2f} h at "
            f"{price_per_hour:g}); raise it, or take fewer --seeds or --only some variants"
        )

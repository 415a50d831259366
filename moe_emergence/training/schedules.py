"""What changes with the step, learning rate and router noise, and the optimizer they act on."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe_emergence.config import OptimConfig


class Rates(NamedTuple):
    """Learning rates of an optimizer step, on the host or on the device."""

    weights: float | Tensor
    routers: float | Tensor
    """Of the routers' weights."""

    @classmethod
    def at(cls, step: int, optim: OptimConfig) -> "Rates":
        """Those of `step` (from 0)."""
        rate, after = learning_rate(step, optim), optim.freeze_router_after
        scale = optim.router_learning_rate_scale if after is None or step < after else 0.0
        return cls(rate, rate * scale)

    def assign(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the next step of an optimizer from `build_optimizer` take these."""
        for group in optimizer.param_groups:
            group["lr"] = self.routers if group["name"] == ROUTERS else self.weights


ROUTERS = "routers"


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Of a step (from 0): linear over `warmup_fraction` of the steps, then a cosine to zero."""
    warmup = round(optim.warmup_fraction * optim.max_steps)
    if step < warmup:
        return optim.learning_rate * (step / warmup)
    progress = (step - warmup) / max(1, optim.max_steps - warmup)
    return optim.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def noise_std(step: int, optim: OptimConfig) -> float:
    """Router noise at `step`: linear from `noise_std` to 0 over `noise_anneal_fraction`."""
    anneal_steps = optim.noise_anneal_fraction * optim.max_steps
    return optim.noise_std * max(0.0, 1.0 - step / anneal_steps) if anneal_steps > 0 else 0.0


def build_optimizer(model: torch.nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices; biases (the experts' too) and norms are not decayed.

    Neither are routers, which have a group of their own, `ROUTERS`: decay would only flatten their
    probabilities.
    """
    groups: dict[str, list[Tensor]] = {"decayed": [], "not decayed": [], ROUTERS: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_group_of(name, parameter)].append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "name": name,
                "weight_decay": optim.weight_decay if name == "decayed" else 0.0,
            }
            for name, parameters in groups.items()
            if parameters
        ],
        lr=optim.learning_rate,
        fused=True,
    )


def _group_of(name: str, parameter: Tensor) -> str:
    if name.endswith("router.weight"):
        return ROUTERS
    return "not decayed" if parameter.ndim < 2 or "bias" in name else "decayed"

"""What changes with the step, learning rate and router noise, and the optimizer they act on."""

import math

import torch

from moe_emergence.config import OptimConfig


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
    """AdamW with weight decay on matrices; biases (the experts' too) and norms are not decayed."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    no_decay = [p for n, p in trained if p.ndim < 2 or "bias" in n]
    decay = [p for n, p in trained if not (p.ndim < 2 or "bias" in n)]
    groups = [
        {"params": decay, "weight_decay": optim.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.learning_rate, fused=True)

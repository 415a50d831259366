"""One optimizer step: forward and backward over all micro-batches, and what it measured.

Letters: A micro-batches, B sequences in one, L tokens in a sequence, N mixture layers, E experts,
D domains.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_emergence.config import OptimConfig
from moe_emergence.moe import RouterDecision, RouterNoise, auxiliary_losses, routing_variance

if TYPE_CHECKING:
    # the step itself needs neither, and is measured where they are not installed
    from accelerate import Accelerator

    from moe_emergence.data.loader import StepBatch


@dataclass(frozen=True)
class Pass:
    """What one forward pass left behind."""

    row_losses_B: Tensor
    """(B,) lm_loss of every sequence, nats per token."""
    decisions: tuple[RouterDecision, ...]


@dataclass(frozen=True)
class StepStatistics:
    """What a step measured, over all its sequences and all processes."""

    lm_loss: Tensor
    """Scalar: mean lm_loss."""
    lb_loss: Tensor
    """Scalar: mean balance loss."""
    z_loss: Tensor
    """Scalar: mean z loss."""
    routing_variance: Tensor
    """(1,) mean routing variance; (0,) where it is not in the loss."""
    domain_loss_D: Tensor
    """(D,) summed lm_loss of the sequences of each domain."""
    domain_rows_D: Tensor
    """(D,) sequences of each domain."""
    expert_counts_NE: Tensor
    """(N, E) assignments."""
    entropy_N: Tensor
    """(N,) mean entropy of the clean probabilities, nats."""


def forward(model: torch.nn.Module, input_ids_BL: Tensor, noise: RouterNoise | None = None) -> Pass:
    """Run one micro-batch through a `NextTokenLoss`, as it is or prepared by accelerate."""
    losses_BL, decisions = model(input_ids_BL, noise)
    return Pass(losses_BL.mean(dim=1), decisions)


def forward_backward(
    accelerator: "Accelerator",
    model: torch.nn.Module,
    batch: "StepBatch",
    optim: OptimConfig,
    noise: RouterNoise | None,
) -> StepStatistics:
    """Accumulate the gradients of one optimizer step.

    With balance scope "global" balance and variance loss count over the whole step, so that
    the result does not depend on how the step is split into micro-batches and processes. All
    activations are needed until all is counted, so a mixture's micro-batches run as one. With
    "micro" each counts for itself.

    Args:
        model: a `NextTokenLoss`, as it is or prepared by accelerate.
        batch: this process's share, (A, B, L).
        noise: of the whole step; None for a dense model.
    """
    num_micro = len(batch.input_ids)
    count_all = noise is not None and optim.balance_scope == "global"
    at_once = num_micro if count_all else 1
    passes: list[Pass] = []
    lb_losses, z_losses, variances = [], [], []
    for first in range(0, num_micro, at_once):
        is_last = first + at_once == num_micro
        with nullcontext() if is_last else accelerator.no_sync(model):
            done = forward(
                model,
                batch.input_ids[first : first + at_once].flatten(0, 1),
                _noise_from(noise, accelerator, first, batch.input_ids[0].numel()),
            )
            loss = done.row_losses_B.mean()
            if done.decisions:
                fractions = _global_fractions(accelerator, done) if count_all else None
                lb_loss, z_loss = auxiliary_losses(done.decisions, None, fractions)
                loss = loss + optim.lb_coef * lb_loss + optim.z_coef * z_loss
                if optim.variance_coef:
                    means = _global_means(accelerator, done) if count_all else None
                    variance = routing_variance(done.decisions, None, means)
                    loss = loss - optim.variance_coef * variance
                    variances.append(variance.detach())
                lb_losses.append(lb_loss.detach())
                z_losses.append(z_loss.detach())
            accelerator.backward(loss * (at_once / num_micro))
        passes.append(done)
    return _sum_up(accelerator, batch, passes, lb_losses, z_losses, variances)


def _noise_from(
    noise: RouterNoise | None, accelerator: "Accelerator", micro: int, tokens: int
) -> RouterNoise | None:
    """The step's noise from micro-batch `micro` of this process on, each of `tokens` tokens.

    In the step's global batch the micro-batches of the processes take turns.
    """
    if noise is None:
        return None
    place = micro * accelerator.num_processes + accelerator.process_index
    stride = accelerator.num_processes * tokens
    return dataclasses.replace(noise, first_token=place * tokens, run=tokens, stride=stride)


def _global_fractions(accelerator: "Accelerator", done: Pass) -> list[Tensor]:
    """Per layer the share (E,) of the whole step's assignments, over all processes."""
    counts_NE = _counts([done]).double()
    if accelerator.num_processes > 1:
        counts_NE = accelerator.reduce(counts_NE, "sum")
    return list((counts_NE / counts_NE.sum(dim=1, keepdim=True)).unbind())


def _global_means(accelerator: "Accelerator", done: Pass) -> list[Tensor] | None:
    """Per layer the mean probabilities (E,) over all processes; None where this is all of them."""
    if accelerator.num_processes == 1:
        return None
    means_NE = torch.stack([d.router_probs.detach().mean(dim=0) for d in done.decisions])
    return list(accelerator.reduce(means_NE, "mean").unbind())


def _counts(passes: Sequence[Pass]) -> Tensor:
    """(N, E) assignments in these passes."""
    per_pass = [torch.stack([d.expert_counts() for d in p.decisions]) for p in passes]
    return torch.stack(per_pass).sum(dim=0)


def _sum_up(
    accelerator: "Accelerator",
    batch: "StepBatch",
    passes: Sequence[Pass],
    lb_losses: Sequence[Tensor],
    z_losses: Sequence[Tensor],
    variances: Sequence[Tensor],
) -> StepStatistics:
    zero = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    rows = torch.cat([p.row_losses_B.detach() for p in passes]).double()
    domains = batch.domains.flatten(0, 1)
    counts_NE, entropy_N = zero.new_zeros(0, 0), zero.new_zeros(0)
    if passes[0].decisions:
        counts_NE = _counts(passes).double()
        entropies = [torch.stack([d.entropy() for d in p.decisions]) for p in passes]
        entropy_N = torch.stack(entropies).double().mean(dim=0)
    parts = (
        rows.mean(),
        torch.stack(list(lb_losses)).double().mean() if lb_losses else zero,
        torch.stack(list(z_losses)).double().mean() if z_losses else zero,
        torch.stack(list(variances)).double().mean() if variances else zero.new_zeros(0),
        rows @ domains,
        domains.sum(dim=0),
        counts_NE,
        entropy_N,
    )
    flat = torch.cat([part.reshape(-1) for part in parts])
    if accelerator.num_processes > 1:
        flat = accelerator.reduce(flat, "sum")
    sizes = [part.numel() for part in parts]
    lm, lb, z, variance, domain_loss, domain_rows, counts, entropy = flat.split(sizes)
    share = 1.0 / accelerator.num_processes
    return StepStatistics(
        (lm * share).squeeze(0),
        (lb * share).squeeze(0),
        (z * share).squeeze(0),
        variance * share,
        domain_loss,
        domain_rows,
        counts.view_as(counts_NE),
        entropy * share,
    )

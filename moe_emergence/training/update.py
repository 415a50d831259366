"""One update of the weights: gradients of a step, clipping, AdamW, and the balancing bias."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_emergence.config import OptimConfig
from moe_emergence.moe import RouterNoise, TopKRouter
from moe_emergence.training.schedules import Rates
from moe_emergence.training.step import StepStatistics, forward_backward

if TYPE_CHECKING:
    # updates are measured where neither is installed
    from accelerate import Accelerator

    from moe_emergence.data.loader import StepBatch


class Outcome(NamedTuple):
    """What an update measured, on the device."""

    sums: StepStatistics
    grad_norm: Tensor
    """Scalar: norm of the gradient before clipping."""


class Update:
    """Takes optimizer steps of `model`, launching every kernel from the host.

    Args:
        accelerator: device, precision and processes.
        model: a `NextTokenLoss`, as it is or prepared by `accelerator`.
        optimizer: of its parameters, likewise.
        bias_rate: step of the routers' balancing bias; 0 leaves it alone.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        optim: OptimConfig,
        bias_rate: float = 0.0,
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.optim, self.bias_rate = optim, bias_rate
        # fused optimizers skip a step where it is 1, and it stays so: without ever waiting for the
        # device, the weights are there with which the first step that is not finite began
        self.spoiled = torch.zeros((), device=accelerator.device)
        wrapped: Any = getattr(optimizer, "optimizer", optimizer)
        wrapped.found_inf = self.spoiled
        self.scale: Tensor | None = None
        parts = any(isinstance(p, DTensor) for p in model.parameters())
        if accelerator.scaler is None and not parts:
            # what they divide gradients by as they read them, which saves clipping its own pass
            self.scale = torch.ones((), device=accelerator.device)
            wrapped.grad_scale = self.scale
        self.routers = [m for m in model.modules() if isinstance(m, TopKRouter)]
        for router in self.routers:
            router.expert_bias_rate = 0.0  # moved here, by the counts of whole steps

    def __call__(self, batch: "StepBatch", noise: RouterNoise | None, rates: Rates) -> Outcome:
        """Take a step with this process's share (A, B, L) of the batch, on the device.

        `noise` is None for a dense model. Rates on the device are read there. From the first step
        whose loss or gradient norm is not finite, weights and optimizer stay as they are.
        """
        rates.assign(self.optimizer)
        sums = self.gradients(batch, noise)
        norm = self._clip(self.optim.max_grad_norm)
        finite = torch.isfinite(norm + sums.lm_loss)
        self.spoiled.copy_(torch.where(finite, self.spoiled, 1.0))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.bias_rate and self.routers:
            for router, counts_E in zip(self.routers, sums.expert_counts_NE, strict=True):
                router.update_expert_bias(counts_E, self.bias_rate)
        return Outcome(sums, norm)

    def _clip(self, max_norm: float) -> Tensor:
        """Norm of the gradient, which the optimizer's step takes down to `max_norm`."""
        if self.scale is None:
            return self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.scale.copy_((norm / max_norm).clamp(min=1))
        return norm

    def gradients(self, batch: "StepBatch", noise: RouterNoise | None) -> StepStatistics:
        """The first half of a step: gradients of all parameters, and what was measured."""
        return forward_backward(self.accelerator, self.model, batch, self.optim, noise)

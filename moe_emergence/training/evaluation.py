"""Evaluation per domain on lm_loss alone; auxiliary losses and routing are reported beside it.

Letters: B sequences, L tokens, N mixture layers, E experts, D domains.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from moe_emergence.data.loader import eval_batches
from moe_emergence.models.mode import evaluating
from moe_emergence.moe import router_z_loss
from moe_emergence.training.step import forward


@dataclass(frozen=True)
class Evaluation:
    """Losses in nats per token over all evaluation tokens, and where the tokens went."""

    lm_loss: float
    domain_lm_loss: dict[str, float]
    lb_loss: float | None
    z_loss: float | None
    domain_fractions: dict[int, list[list[float]]]
    """Per mixture layer: (D, E) share of each domain's assignments, rows as `domain_lm_loss`."""

    def metrics(self) -> dict[str, float]:
        """The evaluation as `metrics.jsonl` keys."""
        row = {"eval/lm_loss": self.lm_loss, "eval/perplexity": math.exp(min(self.lm_loss, 700.0))}
        row |= {f"eval/lm_loss_{domain}": loss for domain, loss in self.domain_lm_loss.items()}
        if self.lb_loss is not None and self.z_loss is not None:
            row |= {"eval/lb_loss": self.lb_loss, "eval/z_loss": self.z_loss}
        return row


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    blocks: Mapping[str, Tensor],
    *,
    batch_size: int,
    max_blocks: int = 0,
    moe_layers: tuple[int, ...] = (),
    num_experts: int = 0,
    together: bool = False,
) -> Evaluation:
    """Evaluate on (rows, L) blocks per domain, shared out over the processes.

    Args:
        model: a `NextTokenLoss`, as it is or prepared by accelerate.
        blocks: int32, per domain.
        batch_size: B per process; it does not change which tokens are seen.
        max_blocks: rows per domain, 0 for all.
        moe_layers: indices of the mixture layers, in order; with `num_experts` E each.
        together: a forward pass needs all processes at once, as that of a sharded model does.
    """
    limit = max_blocks or None
    with evaluating(model):
        per_domain = [
            _domain_sums(
                accelerator,
                model,
                of_domain[:limit],
                batch_size,
                len(moe_layers),
                num_experts,
                together,
            )
            for of_domain in blocks.values()
        ]
    sums_DX = torch.stack(per_domain)
    if accelerator.num_processes > 1:
        sums_DX = accelerator.reduce(sums_DX, "sum")
    loss_D, rows_D, z_D = sums_DX[:, :3].unbind(dim=1)
    lb_loss, z_loss, fractions_DNE = None, None, None
    if moe_layers:
        shape = (len(blocks), 2, len(moe_layers), num_experts)
        counts_DNE, probs_DNE = sums_DX[:, 3:].reshape(shape).unbind(dim=1)
        fractions_DNE = counts_DNE / counts_DNE.sum(dim=-1, keepdim=True).clamp(min=1)
        # over all evaluation tokens at once, so that it does not depend on the batch size
        lb_loss = float(_balance(counts_DNE.sum(dim=0), probs_DNE.sum(dim=0)))
        z_loss = float(z_D.sum() / rows_D.sum())
    return Evaluation(
        lm_loss=float(loss_D.sum() / rows_D.sum()),
        domain_lm_loss=dict(zip(blocks, (loss_D / rows_D).tolist(), strict=True)),
        lb_loss=lb_loss,
        z_loss=z_loss,
        domain_fractions={}
        if fractions_DNE is None
        else {layer: fractions_DNE[:, n].tolist() for n, layer in enumerate(moe_layers)},
    )


def _balance(counts_NE: Tensor, probs_NE: Tensor) -> Tensor:
    """Balance loss from sums over tokens: `E * sum_e f_e P_e` per layer, mean over layers."""
    f_NE = counts_NE / counts_NE.sum(dim=1, keepdim=True)
    p_NE = probs_NE / probs_NE.sum(dim=1, keepdim=True)
    return counts_NE.shape[1] * (f_NE * p_NE).sum(dim=1).mean()


def _domain_sums(
    accelerator: Accelerator,
    model: torch.nn.Module,
    blocks: Tensor,
    batch_size: int,
    num_layers: int,
    num_experts: int,
    together: bool,
) -> Tensor:
    """fp64 sums of one domain over this process's rows, flat.

    Summed lm_loss, rows and summed z loss, then the assignments (N*E,) and the summed clean
    probabilities (N*E,).
    """
    device, processes = accelerator.device, accelerator.num_processes
    losses = torch.zeros(3, dtype=torch.float64, device=device)
    routing = torch.zeros(2, num_layers, num_experts, dtype=torch.float64, device=device)
    done_here = 0
    for batch in eval_batches(blocks, batch_size, accelerator.process_index, processes):
        input_ids = batch.to(device)
        done = forward(model, input_ids)
        losses[0] += done.row_losses_B.double().sum()
        losses[1] += len(input_ids)
        if done.decisions:
            z_losses = [router_z_loss(d.router_logits) for d in done.decisions]
            losses[2] += torch.stack(z_losses).double().mean() * len(input_ids)
            routing[0] += torch.stack([d.expert_counts() for d in done.decisions])
            routing[1] += torch.stack([d.router_probs.double().sum(0) for d in done.decisions])
        done_here += 1
    most = math.ceil(math.ceil(len(blocks) / processes) / batch_size)
    for _ in range(most - done_here if together else 0):
        # not counted: some other process has a row more
        forward(model, blocks[:1].long().to(device))
    return torch.cat([losses, routing.flatten()])

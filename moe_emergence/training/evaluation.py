"""Evaluation per domain on lm_loss alone; auxiliary losses and routing are reported beside it.

Letters: B sequences, L tokens, N mixture layers, E experts, D domains.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from moe_emergence.config import DOMAINS
from moe_emergence.data.loader import eval_batches
from moe_emergence.moe import auxiliary_losses
from moe_emergence.training.step import forward


@dataclass(frozen=True)
class Evaluation:
    """Losses in nats per token over all evaluation tokens, and where the tokens went."""

    lm_loss: float
    domain_lm_loss: dict[str, float]
    lb_loss: float | None
    z_loss: float | None
    domain_fractions: dict[int, list[list[float]]]
    """Per mixture layer: (D, E) share of each domain's assignments, rows in `DOMAINS` order."""

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
) -> Evaluation:
    """Evaluate on (rows, L) blocks per domain, shared out over the processes.

    Args:
        blocks: per domain in `DOMAINS`, int32.
        batch_size: B per process; it does not change which tokens are seen.
        max_blocks: rows per domain, 0 for all.
        moe_layers: indices of the mixture layers, in order.
    """
    was_training = model.training
    model.eval()
    # columns: loss sum, rows, balance and z sums, then the assignments of every layer and expert
    sums = [_domain_sums(accelerator, model, i, blocks, batch_size, max_blocks) for i in _ids()]
    model.train(was_training)
    width = max(s.numel() for s in sums)
    table = torch.stack([torch.nn.functional.pad(s, (0, width - s.numel())) for s in sums])
    if accelerator.num_processes > 1:
        table = accelerator.reduce(table, "sum")
    loss, rows, lb, z = table[:, :4].unbind(dim=1)
    counts_DNE = table[:, 4:].reshape(len(DOMAINS), max(len(moe_layers), 1), -1)
    fractions = counts_DNE / counts_DNE.sum(dim=-1, keepdim=True).clamp(min=1)
    return Evaluation(
        lm_loss=float(loss.sum() / rows.sum()),
        domain_lm_loss=dict(zip(DOMAINS, (loss / rows).tolist(), strict=True)),
        lb_loss=float(lb.sum() / rows.sum()) if moe_layers else None,
        z_loss=float(z.sum() / rows.sum()) if moe_layers else None,
        domain_fractions={
            layer: fractions[:, place].tolist() for place, layer in enumerate(moe_layers)
        },
    )


def _ids() -> range:
    return range(len(DOMAINS))


def _domain_sums(
    accelerator: Accelerator,
    model: torch.nn.Module,
    domain_id: int,
    blocks: Mapping[str, Tensor],
    batch_size: int,
    max_blocks: int,
) -> Tensor:
    """(4 + N*E,) fp64 sums of one domain over this process's rows."""
    device = accelerator.device
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    counts = torch.zeros(0, dtype=torch.float64, device=device)
    rows_BL = blocks[DOMAINS[domain_id]]
    rows_BL = rows_BL[:max_blocks] if max_blocks else rows_BL
    for batch in eval_batches(
        rows_BL,
        batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    ):
        input_ids = batch.to(device)
        domain_ids = torch.full((len(input_ids),), domain_id, device=device)
        done = forward(model, input_ids, domain_ids)
        totals[0] += done.row_losses_B.double().sum()
        totals[1] += len(input_ids)
        if done.decisions:
            lb_loss, z_loss = auxiliary_losses(done.decisions)
            totals[2] += lb_loss.double() * len(input_ids)
            totals[3] += z_loss.double() * len(input_ids)
            batch_counts = torch.stack([d.expert_counts() for d in done.decisions]).reshape(-1)
            counts = batch_counts.double() if not counts.numel() else counts + batch_counts
    return torch.cat([totals, counts])

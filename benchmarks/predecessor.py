"""The baseline: a mixture of experts as a plain PyTorch training loop writes it.

What the system before this library did, written cleanly: one `nn.Sequential` per expert in a
`ModuleList`, a loop over them, fp32, AdamW one parameter at a time, and a second cross-entropy
pass for the losses per domain, read back sequence by sequence.
Letters: T tokens, H model width, E experts, K experts per token, B sequences, L tokens each.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2LMHeadModel

from moe_emergence.models import MoEGPT2LMHeadModel
from moe_emergence.moe import MoELayer, RouterDecision, auxiliary_losses


class LoopedExperts(nn.Module):
    """A drop-in for GPT-2's MLP: routes, loops over experts, and remembers its last decision."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.router = copy.deepcopy(layer.router)
        self.experts = nn.ModuleList(_as_modules(*one) for one in layer.experts.unbind())
        self.last_decision: RouterDecision | None = None

    def forward(self, x_BLH: Tensor) -> Tensor:
        """Weighted sum of every token's experts, in the shape of the input."""
        x_TH = x_BLH.reshape(-1, x_BLH.shape[-1])
        decision = self.router(x_TH)
        y_TH = torch.zeros_like(x_TH)
        for e, expert in enumerate(self.experts):
            token_N, slot_N = torch.where(decision.topk_experts == e)
            if token_N.numel():
                weight_N1 = decision.topk_weights[token_N, slot_N].unsqueeze(-1)
                y_TH = y_TH.index_add(0, token_N, expert(x_TH[token_N]) * weight_N1)
        self.last_decision = decision
        return y_TH.view_as(x_BLH)


def _as_modules(w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> nn.Module:
    up, down = nn.Linear(*w1.shape), nn.Linear(*w2.shape)
    assert b1 is not None
    assert b2 is not None
    with torch.no_grad():
        for linear, weight, bias in ((up, w1, b1), (down, w2, b2)):
            linear.weight.copy_(weight.t())
            linear.bias.copy_(bias)
    return nn.Sequential(up, nn.GELU(approximate="tanh"), down)


def predecessor_model(mixture: MoEGPT2LMHeadModel, dense: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """`dense` with the mixture layers of `mixture` in looped form; same weights, same function."""
    model = copy.deepcopy(dense)
    for index, layer in mixture.moe_layers().items():
        model.transformer.h[index].mlp = LoopedExperts(layer)
    return model


def predecessor_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW that loops over the parameters."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, foreach=False, fused=False)


def predecessor_step(
    model: GPT2LMHeadModel,
    optimizer: torch.optim.Optimizer,
    input_ids_ABL: Tensor,
    domain_ids_AB: Tensor,
    coefficients: Mapping[str, float],
) -> dict[str, float]:
    """One optimizer step over A micro-batches; the mean loss of every domain in it."""
    losses: dict[str, list[float]] = {}
    for input_ids_BL, domain_ids_B in zip(input_ids_ABL, domain_ids_AB, strict=True):
        outputs = model(input_ids=input_ids_BL, labels=input_ids_BL, use_cache=False)
        layers = (m for m in model.modules() if isinstance(m, LoopedExperts))
        decisions = [layer.last_decision for layer in layers if layer.last_decision is not None]
        balance, z = auxiliary_losses(decisions)
        loss = outputs.loss + coefficients["balance"] * balance + coefficients["z"] * z
        (loss / len(input_ids_ABL)).backward()
        with torch.no_grad():
            for row, (ids_L, domain) in enumerate(zip(input_ids_BL, domain_ids_B, strict=True)):
                row_loss = functional.cross_entropy(outputs.logits[row, :-1], ids_L[1:])
                losses.setdefault(str(domain.item()), []).append(row_loss.item())
    nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {domain: sum(values) / len(values) for domain, values in losses.items()}

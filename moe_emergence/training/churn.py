"""Routing churn: how much of a fixed text changes its expert from one check to the next.

Letters: N mixture layers, T tokens of the probe.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from moe_emergence.models.mode import evaluating
from moe_emergence.training.step import forward

ROWS = 8
"""Evaluation blocks of each domain that make the probe."""
HIGH = 0.25

logger = logging.getLogger(__name__)


class ChurnProbe:
    """Remembers the first expert of every token of a fixed text.

    Experts that see other tokens at every check have nothing to specialise in. Every process reads
    the whole probe, so churn does not depend on their number.

    Args:
        blocks: evaluation blocks (rows, L) of each domain.
        layers: the model's mixture layers, in order.
    """

    def __init__(self, blocks: Mapping[str, Tensor], layers: tuple[int, ...]) -> None:
        self.rows = [of_domain[:ROWS] for of_domain in blocks.values()]
        self.layers = layers
        self.step = 0
        self.experts_NT: Tensor | None = None

    @torch.no_grad()
    def check(
        self, model: torch.nn.Module, device: torch.device, step: int, max_steps: int
    ) -> dict[str, float]:
        """Per layer the share of tokens with another first expert than at the last check.

        As `metrics.jsonl` keys; nothing at the first check, and for a dense model.

        Args:
            model: a `NextTokenLoss`, as it is or prepared by accelerate.
            device: of the model.
            step: of the check; in the second half of `max_steps` a share above a quarter is warned
                of.
        """
        if not self.layers:
            return {}
        with evaluating(model):
            before, self.experts_NT = self.experts_NT, _first_experts(model, self.rows, device)
        since, self.step = self.step, step
        if before is None:
            return {}
        churn_N = (before != self.experts_NT).float().mean(dim=1).tolist()
        shares = zip(self.layers, churn_N, strict=True)
        churn = {f"eval/layer_{layer}_churn": share for layer, share in shares}
        if step > max_steps / 2 and max(churn_N) > HIGH:
            worst = churn_N.index(max(churn_N))
            logger.warning(
                "routing churn at step %d: %.0f%% of a fixed text's tokens have another expert in "
                "layer %d than at step %d; experts whose tokens change do not specialise: lower "
                "--router-learning-rate-scale, or give --router-init clusters",
                step, 100 * churn_N[worst], self.layers[worst], since,
            )  # fmt: skip
        return churn

    def state_dict(self) -> dict[str, object]:
        """What the next check compares with."""
        return {"step": self.step, "experts": self.experts_NT}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from `state_dict`."""
        step, experts = state["step"], state["experts"]
        assert isinstance(step, int)
        assert experts is None or isinstance(experts, Tensor)
        self.step, self.experts_NT = step, experts


def _first_experts(model: torch.nn.Module, rows: list[Tensor], device: torch.device) -> Tensor:
    """(N, T) int16, on the host."""
    found = []
    for blocks in rows:
        decisions = forward(model, blocks.long().to(device)).decisions
        found.append(torch.stack([d.topk_experts[:, 0] for d in decisions]))
    return torch.cat(found, dim=1).to("cpu", torch.int16)

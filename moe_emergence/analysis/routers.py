"""Read the routing of any mixture language model through hooks on its routers.

Letters: T tokens (B*L), H model width, E experts, K experts per token.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_emergence.device import input_device
from moe_emergence.models.mode import evaluating
from moe_emergence.moe import RouterDecision
from moe_emergence.moe.pools import DocumentPools
from moe_emergence.moe.routing import HashRouter, TopKRouter

ScoreKind = Literal["probabilities", "softmax logits", "sigmoid logits"]


@dataclass(frozen=True, eq=False)
class LayerRouting:
    """What one layer's router decided for T tokens."""

    layer: int
    """Index in the model."""
    probs_TE: Tensor
    """(T, E) fp32: softmax of the logits, or normalised sigmoids, see `is_sigmoid`."""
    experts_TK: Tensor
    """(T, K) int64, most probable first."""
    hidden_TH: Tensor
    """(T, H) what the router read."""
    pools: DocumentPools | None = None
    """What its choice was limited to."""
    scale: float = 1.0
    """Root mean square of its weight, where there are pools."""


@dataclass(frozen=True)
class RouterInfo:
    """A router of a model."""

    layer: int
    name: str
    """Its module's name in the model."""
    module: nn.Module = field(compare=False)


def find_routers(model: nn.Module) -> list[RouterInfo]:
    """The routers of a model, by layer.

    A router is a module whose class is named so (`TopKRouter`, `MixtralTopKRouter`,
    `OlmoeTopKRouter`, `Qwen3MoeTopKRouter`, `GptOssTopKRouter`, ...): transformers' mixtures share
    the convention, and that it returns logits (T, E), weights (T, K) and experts (T, K).

    Raises:
        ValueError: when the model has none.
    """
    found = []
    for name, module in model.named_modules():
        if type(module).__name__.lower().endswith("router"):
            numbers = re.findall(r"(?:^|\.)(\d+)(?=\.)", name)
            if not numbers:
                raise ValueError(f"router {name}: it is in no numbered layer")
            found.append(RouterInfo(int(numbers[0]), name, module))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no routers that can be read: give a mixture of experts "
            "(Mixtral, OLMoE, Qwen3-MoE, gpt-oss, or a model of this library)"
        )
    return sorted(found, key=lambda router: router.layer)


def is_sigmoid(router: nn.Module, config: Any) -> bool:
    """Whether a router scores every expert by itself (DeepSeek-V3, arXiv 2412.19437, section 2.1).

    Its probabilities then are those scores, divided by their sum.
    """
    function = getattr(config, "scoring_func", None)
    if function is None:
        return hasattr(router, "e_score_correction_bias")
    return bool(function == "sigmoid")


class RouterReader:
    """Collects what the routers of a model decide while it runs.

    Raises:
        ValueError: when the model has no routers, or one returns something else than it should.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.routers = find_routers(model)
        self.layers = [router.layer for router in self.routers]
        self._seen: dict[int, LayerRouting] = {}

    @contextmanager
    def reading(self) -> Iterator["RouterReader"]:
        """Hooks are in place within the block; the model is in evaluation mode there."""
        handles = [
            router.module.register_forward_hook(partial(self._hook, router))
            for router in self.routers
        ]
        try:
            with evaluating(self.model):
                yield self
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def read(self, token_ids: Tensor, attention_mask: Tensor | None = None) -> list[LayerRouting]:
        """Run (B, L) token ids; the decision of every layer, T = B*L in order.

        `attention_mask` (B, L) says what is padding; its tokens are routed too.
        """
        return self.read_and_predict(token_ids, attention_mask)[0]

    @torch.no_grad()
    def read_and_predict(
        self, token_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[list[LayerRouting], Tensor]:
        """As `read`, and the model's logits (B, L, V)."""
        self._seen.clear()
        device = input_device(self.model)
        mask = {} if attention_mask is None else {"attention_mask": attention_mask.to(device)}
        output = self.model(input_ids=token_ids.long().to(device), use_cache=False, **mask)
        logits = output.logits
        missing = sorted(set(self.layers) - set(self._seen))
        if missing:
            raise ValueError(f"the routers of layers {missing} did not run: nothing to read")
        return [self._seen[layer] for layer in self.layers], logits

    def _hook(self, router: RouterInfo, module: nn.Module, inputs: Any, output: Any) -> None:
        scores, experts = scores_and_experts(router.name, output)
        probs = probabilities(scores, score_kind(module, getattr(self.model, "config", None)))
        chosen = probs.gather(1, experts)
        order = chosen.argsort(dim=1, descending=True, stable=True)
        hidden = inputs[0].detach()
        pools, scale = module.pools if isinstance(module, TopKRouter) else None, 1.0
        if pools is not None:
            assert isinstance(module, TopKRouter)
            scale = float(module.weight.detach().float().square().mean().sqrt())
        self._seen[router.layer] = LayerRouting(
            router.layer,
            probs,
            experts.gather(1, order),
            hidden.reshape(-1, hidden.shape[-1]),
            pools,
            scale,
        )


def score_kind(router: nn.Module, config: Any) -> ScoreKind:
    """What a router's scores are, see `scores_and_experts`."""
    if isinstance(router, TopKRouter | HashRouter):
        return "probabilities"
    return "sigmoid logits" if is_sigmoid(router, config) else "softmax logits"


def probabilities(scores: Tensor, kind: ScoreKind) -> Tensor:
    """fp32 probabilities (..., E) of a router's scores; see `is_sigmoid` for what they are."""
    if kind == "softmax logits":
        return scores.float().softmax(dim=-1)
    if kind == "sigmoid logits":
        sigmoids = scores.float().sigmoid()
        return sigmoids / sigmoids.sum(dim=-1, keepdim=True)
    return scores.float()


def scores_and_experts(name: str, output: Any) -> tuple[Tensor, Tensor]:
    """Scores (T, E) and experts (T, K) int64 of what the router called `name` returned, detached.

    Raises:
        ValueError: naming the router, when it returned something else.
    """
    if isinstance(output, RouterDecision):
        return output.router_probs.detach(), output.topk_experts
    tensors = [part for part in output if isinstance(part, Tensor)] if _is_tuple(output) else []
    whole = [part for part in tensors if not part.is_floating_point()]
    if not tensors or not whole or tensors[0].ndim != 2 or whole[-1].ndim != 2:
        raise ValueError(
            f"router {name}: it returns {type(output).__name__}, not logits (T, E) and experts "
            "(T, K); transformers' own mixtures can be read"
        )
    return tensors[0].detach(), whole[-1].detach().long()


def _is_tuple(output: object) -> bool:
    return isinstance(output, (tuple, list))

"""Experts taken out of a router's choice, or favoured in it, while a model runs.

Letters: T tokens, E experts.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from emergence_kernels import route
from moe_emergence.analysis.routers import RouterInfo, find_routers
from moe_emergence.moe import RouterDecision
from moe_emergence.moe.routing import TopKRouter
from moe_emergence.settings import check

BOOST = 4.0
"""Added to a boosted expert's logit where nothing else is said: its odds times 55."""
_ENTRY = re.compile(r"(\d+):(\d+)(?:=([-+]?\d+(?:\.\d+)?))?")


@contextmanager
def steered(model: nn.Module, mute: Collection[str], boost: Collection[str]) -> Iterator[None]:
    """Within the block the muted experts are never chosen, and boosted ones more often.

    Args:
        model: a mixture of this library.
        mute: experts as LAYER:EXPERT.
        boost: the same, or LAYER:EXPERT=BIAS with what is added to the expert's logit.

    Raises:
        ValueError: naming the flag, for what is no such expert, for a router that has no logits,
            and where too few experts would be left.
    """
    muted: dict[int, set[int]] = {}
    boosts: dict[int, dict[int, float]] = {}
    routers: dict[int, RouterInfo] = {}
    for entry in mute:
        layer, expert, bias = _entry(entry, "--mute")
        check(bias is None, "--mute", entry, "give LAYER:EXPERT; a muted expert has no bias")
        routers[layer] = _router(model, "--mute", entry, layer, expert)
        muted.setdefault(layer, set()).add(expert)
    for entry in boost:
        layer, expert, bias = _entry(entry, "--boost")
        routers[layer] = _router(model, "--boost", entry, layer, expert)
        check(
            expert not in muted.get(layer, ()), "--boost", entry, "it is muted; give one of the two"
        )
        boosts.setdefault(layer, {})[expert] = BOOST if bias is None else bias
    for layer, experts in muted.items():
        module: Any = routers[layer].module
        left = module.weight.shape[0] - len(experts)
        check(
            left >= module.top_k, "--mute", " ".join(f"{layer}:{e}" for e in sorted(experts)),
            f"{left} experts would be left in layer {layer}, which gives {module.top_k} to every "
            "token; mute fewer",
        )  # fmt: skip
    with ExitStack() as stack:
        for layer, router in routers.items():
            hook = choosing_again(muted.get(layer, ()), boosts.get(layer, {}))
            stack.callback(router.module.register_forward_hook(hook).remove)
        yield


def choosing_again(muted: Collection[int], boosts: Mapping[int, float]) -> Any:
    """A forward hook of a `TopKRouter`: its choice, weights and probabilities with other logits."""
    gone = list(muted)

    def hook(module: nn.Module, inputs: Any, output: Any) -> RouterDecision:
        assert isinstance(module, TopKRouter)
        logits_TE = output.router_logits.clone()
        for expert, bias in boosts.items():
            logits_TE[:, expert] += bias
        # a finite number: log(0) times a probability of 0 would be NaN in the sums
        logits_TE[:, gone] = -1e9
        bias_E = module.expert_bias
        if bias_E is not None:
            # the choice is by probability and bias: neither may bring one back
            bias_E = bias_E.clone()
            bias_E[gone] = -1e9
        routing = route(logits_TE, module.top_k, None, bias_E)
        weights = routing.weights_TK
        if module.weigh_by_probability:
            weights = routing.probs_TE.gather(1, routing.experts_TK)
        return RouterDecision(
            logits_TE, routing.probs_TE, routing.noisy_probs_TE, routing.experts_TK, weights
        )

    return hook


def _entry(entry: str, flag: str) -> tuple[int, int, float | None]:
    found = _ENTRY.fullmatch(entry)
    if found is None:
        also = " or 2:0=1.5" if flag == "--boost" else ""
        raise ValueError(f"{flag} {entry}: give LAYER:EXPERT, such as 2:0{also}")
    return int(found[1]), int(found[2]), None if found[3] is None else float(found[3])


def _router(model: nn.Module, flag: str, entry: str, layer: int, expert: int) -> RouterInfo:
    try:
        known = {router.layer: router for router in find_routers(model)}
    except ValueError as error:
        raise ValueError(f"{flag} {entry}: {error}") from error
    layers = ", ".join(map(str, known))
    check(layer in known, flag, entry, f"the model has mixtures in layers {layers}")
    module = known[layer].module
    if not isinstance(module, TopKRouter):
        raise ValueError(
            f"{flag} {entry}: layer {layer} has a {type(module).__name__}; only routers of this "
            "library that choose by logits can be steered, no hash router"
        )
    experts = len(module.weight)
    check(expert < experts, flag, entry, f"layer {layer} has experts 0 to {experts - 1}")
    return known[layer]

"""A smaller mixture cut out of a mixture: some of its experts, and the router's rows for them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moe_emergence.models.mixture import MixtureModel
from moe_emergence.moe import TopKRouter


@torch.no_grad()
def keep_experts(model: MixtureModel, kept: Mapping[int, Sequence[int]]) -> Any:
    """A model of the same class with the experts `kept[layer]` alone, in that order.

    Tokens go to the best of those that are left: what `analysis.ablation` measures by rerouting,
    but for document pools, which here are of the experts that are left.

    Raises:
        ValueError: when a mixture layer is not named, for other experts than the layer has, for
            different numbers of them, for fewer than a token needs, and for hash routers, which
            have no next best.
    """
    layers = model.moe_layers()
    sizes = {len(set(experts)) for experts in kept.values()}
    if set(kept) != set(layers) or len(sizes) != 1:
        raise ValueError(f"keep experts of layers {sorted(layers)}, as many of each; not {kept}")
    (size,) = sizes
    top_k = model.config.num_experts_per_tok
    if not top_k <= size:
        raise ValueError(f"keep {size} experts: a token needs {top_k}")
    for index, layer in layers.items():
        if not isinstance(layer.router, TopKRouter):
            raise ValueError(f"layer {index}: a hash router has no next best expert")
        outside = [e for e in kept[index] if not 0 <= e < layer.experts.num_experts]
        if outside:
            raise ValueError(f"layer {index} has no experts {outside}")
    config = copy.deepcopy(model.config)
    config.num_experts = size
    config.pool_size = min(config.pool_size, size)
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        for experts in [kept[i] for i, layer in layers.items() if layer is module]:
            for own in list(module.state_dict()):
                state[f"{name}.{own}"] = state[f"{name}.{own}"][list(experts)]
    smaller: Any = type(model)(config)
    torch.nn.Module.to(smaller, model.device, model.dtype)
    smaller.load_state_dict(state)
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.train(model.training)

"""Upcycling: a dense GPT-2 becomes a mixture of experts (arXiv 2212.05055).

Letters: E experts.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from moe_emergence.models.configuration import TANH_GELU, MoEGPT2Config
from moe_emergence.models.modeling import MoEGPT2LMHeadModel
from moe_emergence.moe import MoELayer, TopKRouter
from moe_emergence.moe.routing import RouterKind, Top1Weight


@torch.no_grad()
def upcycle(
    dense_model: GPT2LMHeadModel,
    layers: Sequence[int],
    num_experts: int = 8,
    top_k: int = 1,
    *,
    noise: float = 1e-3,
    seed: int = 0,
    router: RouterKind = "learned",
    top1_weight: Top1Weight = "straight-through",
    use_expert_bias: bool = False,
    expert_bias_rate: float = 0.001,
    dispatch: str = "auto",
    lb_coef: float = 0.01,
    z_coef: float = 0.001,
) -> MoEGPT2LMHeadModel:
    """A mixture of experts that starts as the dense model.

    Every expert is a copy of its layer's MLP plus Gaussian noise of `noise` times the standard
    deviation of each parameter; everything else is copied exactly. With noise 0 the logits equal
    the dense model's, unless a top-1 expert is weighted by its probability. The dense model is not
    changed. Every copy keeps its dtype and stays frozen if it was; activation checkpointing,
    the attention's implementation and whether the head is tied stay what they were.

    Args:
        dense_model: GPT-2 with its tanh GELU.
        layers: indices of the layers to convert.
        num_experts, top_k: E experts, of which K see each token.
        noise: relative standard deviation of the noise that breaks the experts' symmetry.
        seed: of that noise and of the router's weights.
        router, top1_weight, use_expert_bias, expert_bias_rate, dispatch: see `MoELayer`.
        lb_coef, z_coef: weights of the auxiliary losses in the output's `loss`.

    Raises:
        ValueError: for layers outside the model, a bad top_k, or a model that is not such a GPT-2.
    """
    dense = dense_model.config
    if dense.model_type != "gpt2" or not isinstance(dense_model, GPT2LMHeadModel):
        raise ValueError(
            f"--base: upcycling takes a dense GPT-2, not {type(dense_model).__name__} "
            f"({dense.model_type})"
        )
    if dense.activation_function not in TANH_GELU or dense.add_cross_attention:
        raise ValueError(
            f"--base: upcycling takes a GPT-2 without cross-attention and with a tanh GELU "
            f"({' or '.join(TANH_GELU)}), not {dense.activation_function}"
        )
    inherited = {k: v for k, v in dense.to_dict().items() if k not in _OWN_KEYS}
    # what the weights are, whatever the configuration says
    tied = dense_model.lm_head.weight is dense_model.transformer.wte.weight
    inherited |= {"tie_word_embeddings": tied, "attn_implementation": dense._attn_implementation}
    config = MoEGPT2Config(
        **inherited,
        moe_layers=list(layers),
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        router=router,
        top1_weight=top1_weight,
        use_expert_bias=use_expert_bias,
        expert_bias_rate=expert_bias_rate,
        lb_coef=lb_coef,
        z_coef=z_coef,
    )
    model = MoEGPT2LMHeadModel(config)
    torch.nn.Module.to(model, dense_model.device, dense_model.dtype)
    _take_after(model, dense_model)
    model.generation_config = copy.deepcopy(dense_model.generation_config)
    state = dense_model.state_dict()
    missing, unexpected = model.load_state_dict(state, strict=False)
    converted = {f"transformer.h.{i}.mlp.{n}" for i in layers for n in DENSE_NAMES.values()}
    _check_parameters(converted, set(state), set(missing), set(unexpected))
    generator = torch.Generator().manual_seed(seed)
    for index, layer in model.moe_layers().items():
        _copy_mlp(layer, state, f"transformer.h.{index}.mlp.", noise, generator)
    if dense_model.transformer.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.set_dispatch(dispatch)
    return model.train(dense_model.training)


_OWN_KEYS = frozenset({"model_type", "architectures", "transformers_version", "dtype"})
DENSE_NAMES = {
    "w1": "c_fc.weight",
    "w1_bias": "c_fc.bias",
    "w2": "c_proj.weight",
    "w2_bias": "c_proj.bias",
}


def _check_parameters(
    converted: set[str], state: set[str], missing: set[str], unexpected: set[str]
) -> None:
    """Refuse a model with other parameters than GPT-2's: adapters, or a bias of the head."""
    new = (".mlp.experts.", ".mlp.router.")
    lacking = {k for k in missing if not any(part in k for part in new)}
    stray = sorted((unexpected - converted) | lacking | (converted - state))
    if stray:
        more = f" and {len(stray) - 3} more" if len(stray) > 3 else ""
        raise ValueError(
            f"--base: upcycling takes GPT-2's own parameters; {', '.join(stray[:3])}{more} are "
            "missing or not among them; merge adapters (merge_and_unload), take off what was added"
        )


def _take_after(model: MoEGPT2LMHeadModel, dense_model: GPT2LMHeadModel) -> None:
    """Every parameter has the dtype, and is trained or not, as the dense model's."""
    theirs = dict(dense_model.named_parameters())
    for name, parameter in model.named_parameters():
        prefix, _, own = name.rpartition("experts.")
        original = theirs.get(prefix + DENSE_NAMES[own] if prefix else name)
        if original is not None:
            parameter.data = parameter.data.to(original.dtype)
            parameter.requires_grad_(original.requires_grad)


def _copy_mlp(
    layer: MoELayer,
    state: dict[str, Tensor],
    prefix: str,
    noise: float,
    generator: torch.Generator,
) -> None:
    for name, dense_name in DENSE_NAMES.items():
        source = state[prefix + dense_name]
        target = getattr(layer.experts, name)
        deviates = torch.randn(target.shape, generator=generator).to(target)
        target.copy_(
            source + noise * source.std() * deviates if noise else source.expand_as(target)
        )
    if isinstance(layer.router, TopKRouter):
        weight_EH = layer.router.weight
        weight_EH.copy_(0.02 * torch.randn(weight_EH.shape, generator=generator))

"""Upcycling: a dense language model becomes a mixture of experts (arXiv 2212.05055).

Letters: E experts.
"""

import copy
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from moe_emergence.models.families import Family, family_of
from moe_emergence.models.llama import MixtureForCausalLM
from moe_emergence.models.modeling import MoEGPT2LMHeadModel
from moe_emergence.models.room import check_fits
from moe_emergence.moe import TopKRouter
from moe_emergence.moe.routing import RouterKind, Top1Weight


@overload
def upcycle(
    dense_model: GPT2LMHeadModel, layers: Sequence[int], *args: Any, **options: Any
) -> MoEGPT2LMHeadModel: ...
@overload
def upcycle(
    dense_model: LlamaForCausalLM, layers: Sequence[int], *args: Any, **options: Any
) -> MixtureForCausalLM: ...
@overload
def upcycle(dense_model: Any, layers: Sequence[int], *args: Any, **options: Any) -> Any: ...
@torch.no_grad()
def upcycle(
    dense_model: Any,
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
    pool_size: int = 0,
    document_end: int | None = None,
    dispatch: str = "auto",
    lb_coef: float = 0.01,
    z_coef: float = 0.001,
    variance_coef: float = 0.0,
) -> Any:
    """A mixture of experts that starts as the dense model.

    Every expert is a copy of its layer's MLP plus Gaussian noise of `noise` times the standard
    deviation of each parameter; everything else is copied exactly. With noise 0 the logits equal
    the dense model's, unless a top-1 expert is weighted by its probability. The dense model is not
    changed. Every copy keeps its dtype and stays frozen if it was; activation checkpointing,
    the attention's implementation and whether the head is tied stay what they were.

    Args:
        dense_model: GPT-2 with its tanh GELU, or a Llama, Mistral, Qwen2 or Qwen3 with SwiGLU; it
            becomes a `MoEGPT2LMHeadModel`, `MoELlamaForCausalLM` and so on.
        layers: indices of the layers to convert.
        num_experts, top_k: E experts, of which K see each token.
        noise: relative standard deviation of the noise that breaks the experts' symmetry.
        seed: of that noise and of the router's weights.
        router, top1_weight, use_expert_bias, expert_bias_rate, dispatch: see `MoELayer`.
        pool_size: experts that a document's tokens choose among, see `MixtureConfig`.
        document_end: id of the token that ends a document; None for the model's `eos_token_id`.
        lb_coef, z_coef, variance_coef: weights of the auxiliary losses in the output's `loss`.

    Raises:
        ValueError: for layers outside the model, a bad top_k or pool_size, more weights than this
            machine has memory for, or any other model.
    """
    family, dense = family_of(dense_model), dense_model.config
    inherited = {k: v for k, v in dense.to_dict().items() if k not in _OWN_KEYS}
    # what the weights are, whatever the configuration says
    tied = dense_model.lm_head.weight is dense_model.get_input_embeddings().weight
    inherited |= {"tie_word_embeddings": tied, "attn_implementation": dense._attn_implementation}
    config = family.config(
        **inherited,
        moe_layers=list(layers),
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        router=router,
        top1_weight=top1_weight,
        use_expert_bias=use_expert_bias,
        expert_bias_rate=expert_bias_rate,
        pool_size=pool_size,
        document_end=document_end,
        lb_coef=lb_coef,
        z_coef=z_coef,
        variance_coef=variance_coef,
    )
    check_fits("--num-experts", num_experts, family.mixture, config)
    model = family.mixture(config)
    torch.nn.Module.to(model, dense_model.device, dense_model.dtype)
    _take_after(model, dense_model, family)
    model.generation_config = copy.deepcopy(dense_model.generation_config)
    if pool_size:
        model.generation_config.use_cache = False
    state = dense_model.state_dict()
    missing, unexpected = model.load_state_dict(state, strict=False)
    names = [name for sources in family.sources.values() for name in sources]
    converted = {family.blocks.format(i) + name for i in layers for name in names}
    _check_parameters(family.name, converted, set(state), set(missing), set(unexpected))
    generator = torch.Generator().manual_seed(seed)
    for index, layer in model.moe_layers().items():
        for name in family.sources:
            _copy(getattr(layer.experts, name), family.parts(state, index, name), noise, generator)
        if isinstance(layer.router, TopKRouter):
            weight_EH = layer.router.weight
            weight_EH.copy_(0.02 * torch.randn(weight_EH.shape, generator=generator))
    if dense_model.base_model.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.set_dispatch(dispatch)
    return model.train(dense_model.training)


_OWN_KEYS = frozenset({"model_type", "architectures", "transformers_version", "dtype"})


def _check_parameters(
    family: str, converted: set[str], state: set[str], missing: set[str], unexpected: set[str]
) -> None:
    """Refuse a model with other parameters than its family's: adapters, or a bias of the head."""
    new = (".mlp.experts.", ".mlp.router.")
    lacking = {k for k in missing if not any(part in k for part in new)}
    stray = sorted((unexpected - converted) | lacking | (converted - state))
    if stray:
        more = f" and {len(stray) - 3} more" if len(stray) > 3 else ""
        raise ValueError(
            f"--base: upcycling takes {family}'s own parameters; {', '.join(stray[:3])}{more} are "
            "missing or not among them; merge adapters (merge_and_unload), take off what was added"
        )


def _take_after(model: Any, dense_model: Any, family: Family) -> None:
    """Every parameter has the dtype, and is trained or not, as the dense model's."""
    theirs = dict(dense_model.named_parameters())
    for name, parameter in model.named_parameters():
        prefix, _, own = name.rpartition("experts.")
        original = theirs.get(prefix + family.sources[own][0] if prefix else name)
        if original is not None:
            parameter.data = parameter.data.to(original.dtype)
            parameter.requires_grad_(original.requires_grad)


def _copy(
    target: Tensor, parts: Sequence[Tensor], noise: float, generator: torch.Generator
) -> None:
    """Every expert in `target` (E, ...) becomes `parts` side by side, each with its own noise."""
    for place, part in zip(
        target.split([part.shape[-1] for part in parts], dim=-1), parts, strict=True
    ):
        deviates = torch.randn(place.shape, generator=generator).to(place)
        place.copy_(part + noise * part.std() * deviates if noise else part.expand_as(place))

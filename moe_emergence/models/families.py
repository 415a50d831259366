"""The dense families that can become mixtures, and where an expert's weights are in them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import (
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from moe_emergence.models import llama
from moe_emergence.models.configuration import (
    SILU,
    TANH_GELU,
    MoEGPT2Config,
    MoELlamaConfig,
    MoEMistralConfig,
    MoEQwen2Config,
    MoEQwen3Config,
)
from moe_emergence.models.modeling import MoEGPT2LMHeadModel


@dataclass(frozen=True)
class Family:
    """A dense model class of transformers, and the mixture it becomes."""

    name: str
    dense: type[Any]
    config: type[Any]
    mixture: type[Any]
    blocks: str
    """Prefix of layer i's MLP in the state dict, with `{}` for i."""
    sources: Mapping[str, Sequence[str]]
    """Per parameter of `Experts` the dense parameters that lie side by side in it, by columns."""
    transposed: bool
    """Dense weights are (out, in), experts' (in, out)."""
    dropout: Sequence[str]
    """Where a dense configuration has its dropout probabilities."""
    obstacle: Callable[[Any], str | None]
    """What in a dense configuration cannot be made into experts, if anything."""

    def parts(self, state: Mapping[str, Tensor], index: int, name: str) -> list[Tensor]:
        """What the experts' parameter `name` of layer `index` is copied from, by columns."""
        found = [state[self.blocks.format(index) + source] for source in self.sources[name]]
        return [part.t() for part in found] if self.transposed else found


def _no_gpt2_mlp(config: Any) -> str | None:
    if config.activation_function in TANH_GELU and not config.add_cross_attention:
        return None
    return (
        f"a GPT-2 without cross-attention and with a tanh GELU ({' or '.join(TANH_GELU)}), not "
        f"{config.activation_function}"
    )


def _no_swiglu(config: Any) -> str | None:
    if config.hidden_act in SILU and not getattr(config, "mlp_bias", False):
        return None
    return f"an MLP without biases and with {' or '.join(SILU)}, not {config.hidden_act}"


def _llama_class(name: str, dense: type[Any], config: type[Any], mixture: type[Any]) -> Family:
    sources = {"w1": ("gate_proj.weight", "up_proj.weight"), "w2": ("down_proj.weight",)}
    blocks, dropout = "model.layers.{}.mlp.", ("attention_dropout",)
    return Family(name, dense, config, mixture, blocks, sources, True, dropout, _no_swiglu)


FAMILIES = {
    family.dense: family
    for family in (
        Family(
            "GPT-2", GPT2LMHeadModel, MoEGPT2Config, MoEGPT2LMHeadModel, "transformer.h.{}.mlp.",
            {"w1": ("c_fc.weight",), "w1_bias": ("c_fc.bias",), "w2": ("c_proj.weight",),
             "w2_bias": ("c_proj.bias",)},
            False, ("resid_pdrop", "embd_pdrop", "attn_pdrop"), _no_gpt2_mlp,
        ),
        _llama_class("Llama", LlamaForCausalLM, MoELlamaConfig, llama.MoELlamaForCausalLM),
        _llama_class("Mistral", MistralForCausalLM, MoEMistralConfig, llama.MoEMistralForCausalLM),
        _llama_class("Qwen2", Qwen2ForCausalLM, MoEQwen2Config, llama.MoEQwen2ForCausalLM),
        _llama_class("Qwen3", Qwen3ForCausalLM, MoEQwen3Config, llama.MoEQwen3ForCausalLM),
    )
}  # fmt: skip


def family_of(dense_model: Any) -> Family:
    """The family of a dense language model.

    Raises:
        ValueError: for any other model, and for an MLP that experts cannot be copies of.
    """
    family = FAMILIES.get(type(dense_model))
    if family is None:
        known = ", ".join(family.name for family in FAMILIES.values())
        raise ValueError(
            f"--base: upcycling takes a dense model of {known}, not "
            f"{type(dense_model).__name__} ({dense_model.config.model_type})"
        )
    obstacle = family.obstacle(dense_model.config)
    if obstacle is not None:
        raise ValueError(f"--base: upcycling takes {obstacle}")
    return family

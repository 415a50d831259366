"""Llama-class models with mixture-of-experts layers: Llama, Mistral, Qwen2, Qwen3.

One way for all families with their layout (RMSNorm, rotary positions, SwiGLU): transformers' own
model runs, and in a converted layer `mlp` is a mixture. Parameters have the family's names; a
converted layer has `mlp.router` and `mlp.experts` in place of the projections. Letters: B
sequences, L tokens each, H model width, V vocabulary.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from moe_emergence.models.configuration import (
    MoELlamaConfig,
    MoEMistralConfig,
    MoEQwen2Config,
    MoEQwen3Config,
)
from moe_emergence.models.mixture import MixtureHead, MixtureModel, mixture_layer, run_mixture
from moe_emergence.models.outputs import MoECausalLMOutput
from moe_emergence.moe import MoELayer, RouterNoise

if TYPE_CHECKING:
    _OfFamily: Any
else:
    _OfFamily = object


class MixtureLayer(_OfFamily):
    """Before a family's decoder layer: its MLP is a mixture in the layers that the config names."""

    mlp: Any

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        self.is_moe = layer_idx in config.moe_layers
        self.pool_size = config.pool_size
        if self.is_moe:
            width, inner = config.hidden_size, config.intermediate_size
            self.mlp = mixture_layer(config, width, inner, "swiglu", layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        router_noise: RouterNoise | None = None,
        token_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states (B, L, H); output capturing collects the mixture's decision."""
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if not self.is_moe:
            return hidden_states + self.mlp(normed)
        mixed, _ = run_mixture(self, normed, router_noise, token_ids, cache)
        return hidden_states + mixed


class MixtureDecoder(MixtureModel, _OfFamily):
    """Before a family's model without a head."""

    layer_class: type[MixtureLayer]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            self.layer_class(config, index) for index in range(config.num_hidden_layers)
        )
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the family's, with `router_noise`; the output has `router_decisions`."""
        outputs = super().forward(input_ids, *args, token_ids=input_ids, **kwargs)
        # of no layer nothing is collected
        outputs["router_decisions"] = outputs.get("router_decisions") or ()
        return outputs


class MixtureForCausalLM(MixtureHead, MixtureModel, _OfFamily):
    """Before a family's language model."""

    decoder_class: type[MixtureDecoder]
    # a head that is tied to the embedding has to be in one group with it, that of the whole model
    _fsdp_plan: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.decoder_class(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        router_noise: RouterNoise | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> MoECausalLMOutput:
        """As `MoEGPT2LMHeadModel.forward`, with the family's order of arguments."""
        return self._run(
            labels,
            logits_to_keep,
            num_items_in_batch,
            attention_mask,
            input_ids=input_ids,
            cache=cache,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            router_noise=router_noise,
            **kwargs,
        )


def _recorded(layer: type[nn.Module], family: type[Any]) -> dict[str, Any]:
    """What output capturing records: as in the family's model, and the mixtures' decisions."""
    return {
        **family._can_record_outputs,
        "hidden_states": layer,
        "router_decisions": OutputRecorder(MoELayer, index=1),
    }


class MoELlamaDecoderLayer(MixtureLayer, LlamaDecoderLayer):
    """Llama's layer."""


class MoELlamaModel(MixtureDecoder, LlamaModel):
    """Llama without a head."""

    config_class = MoELlamaConfig
    layer_class = MoELlamaDecoderLayer
    _no_split_modules = ["MoELlamaDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = _recorded(MoELlamaDecoderLayer, LlamaModel)


class MoELlamaForCausalLM(MixtureForCausalLM, LlamaForCausalLM):
    """Llama with mixture layers."""

    config_class = MoELlamaConfig
    decoder_class = MoELlamaModel
    _no_split_modules = ["MoELlamaDecoderLayer"]  # noqa: RUF012


class MoEMistralDecoderLayer(MixtureLayer, MistralDecoderLayer):
    """Mistral's layer."""


class MoEMistralModel(MixtureDecoder, MistralModel):
    """Mistral without a head."""

    config_class = MoEMistralConfig
    layer_class = MoEMistralDecoderLayer
    _no_split_modules = ["MoEMistralDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = _recorded(MoEMistralDecoderLayer, MistralModel)


class MoEMistralForCausalLM(MixtureForCausalLM, MistralForCausalLM):
    """Mistral with mixture layers."""

    config_class = MoEMistralConfig
    decoder_class = MoEMistralModel
    _no_split_modules = ["MoEMistralDecoderLayer"]  # noqa: RUF012


class MoEQwen2DecoderLayer(MixtureLayer, Qwen2DecoderLayer):
    """Qwen2's layer."""


class MoEQwen2Model(MixtureDecoder, Qwen2Model):
    """Qwen2 without a head."""

    config_class = MoEQwen2Config
    layer_class = MoEQwen2DecoderLayer
    _no_split_modules = ["MoEQwen2DecoderLayer"]  # noqa: RUF012
    _can_record_outputs = _recorded(MoEQwen2DecoderLayer, Qwen2Model)


class MoEQwen2ForCausalLM(MixtureForCausalLM, Qwen2ForCausalLM):
    """Qwen2 with mixture layers."""

    config_class = MoEQwen2Config
    decoder_class = MoEQwen2Model
    _no_split_modules = ["MoEQwen2DecoderLayer"]  # noqa: RUF012


class MoEQwen3DecoderLayer(MixtureLayer, Qwen3DecoderLayer):
    """Qwen3's layer."""


class MoEQwen3Model(MixtureDecoder, Qwen3Model):
    """Qwen3 without a head."""

    config_class = MoEQwen3Config
    layer_class = MoEQwen3DecoderLayer
    _no_split_modules = ["MoEQwen3DecoderLayer"]  # noqa: RUF012
    _can_record_outputs = _recorded(MoEQwen3DecoderLayer, Qwen3Model)


class MoEQwen3ForCausalLM(MixtureForCausalLM, Qwen3ForCausalLM):
    """Qwen3 with mixture layers."""

    config_class = MoEQwen3Config
    decoder_class = MoEQwen3Model
    _no_split_modules = ["MoEQwen3DecoderLayer"]  # noqa: RUF012

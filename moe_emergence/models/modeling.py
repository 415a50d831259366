"""GPT-2 with mixture-of-experts layers, as a Hugging Face model.

Parameters have GPT-2's names; a converted layer has `mlp.router` and `mlp.experts` in place of
`mlp.c_fc` and `mlp.c_proj`. Letters: B sequences, L tokens each, H model width, V vocabulary.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, GPT2PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from moe_emergence.models.block import MoEGPT2Block
from moe_emergence.models.configuration import MoEGPT2Config
from moe_emergence.models.mixture import MixtureHead, MixtureModel
from moe_emergence.models.outputs import MoECausalLMOutput, MoEModelOutput
from moe_emergence.moe import RouterNoise


class MoEGPT2PreTrainedModel(MixtureModel, GPT2PreTrainedModel):
    """Weight initialisation, and what transformers needs to know about the family."""

    config_class = MoEGPT2Config
    config: MoEGPT2Config
    _no_split_modules = ["MoEGPT2Block"]  # noqa: RUF012 - transformers reads plain class attributes
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": OutputRecorder(MoEGPT2Block, index=0),
        "attentions": OutputRecorder(GPT2Attention, index=1),
    }

    def _output_std(self) -> float:
        return self.config.initializer_range / math.sqrt(2 * self.config.n_layer)


class MoEGPT2Model(MoEGPT2PreTrainedModel):
    """The transformer without the language-model head."""

    def __init__(self, config: MoEGPT2Config) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([MoEGPT2Block(config, i) for i in range(config.num_hidden_layers)])
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.wte

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the token embedding."""
        self.wte = cast(nn.Embedding, new_embeddings)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        router_noise: RouterNoise | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> MoEModelOutput:
        """Run (B, L) `input_ids`, or (B, L, H) `inputs_embeds`, through all blocks.

        `capture_outputs` acts on the last two arguments. There is no `**kwargs`: an argument that
        transformers renames or a user misspells is a `TypeError`, not a different result.

        Raises:
            ValueError: for more tokens, those in the cache included, than there are positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        # of positions it looks for packed sequences, which waits for the device: ours have none
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            length = inputs_embeds.shape[1]
            # of some caches the length is on the device, and is not waited for
            if isinstance(seen, int) and seen + length > self.config.max_position_embeddings:
                raise _too_long(f"{seen + length} tokens", self.config)
            position_ids = torch.arange(length, device=inputs_embeds.device) + seen
            position_ids = position_ids.unsqueeze(0)
        try:
            positions = self.wpe(position_ids)
        except IndexError as error:  # on a CPU
            raise _too_long(f"position_ids up to {position_ids.max()}", self.config) from error
        hidden_states = self.drop(inputs_embeds + positions)
        decisions = []
        for block in self.h:
            hidden_states, decision = block(
                hidden_states,
                cache if not (self.gradient_checkpointing and self.training) else None,
                causal_mask,
                position_ids,
                router_noise,
                input_ids,
            )
            if decision is not None:
                decisions.append(decision)
        return MoEModelOutput(
            last_hidden_state=self.ln_f(hidden_states),
            cache=cache if use_cache else None,
            router_decisions=tuple(decisions),
        )


class MoEGPT2LMHeadModel(MixtureHead, MoEGPT2PreTrainedModel, GenerationMixin):
    """GPT-2 with mixture-of-experts layers and a language-model head tied to the embedding."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: MoEGPT2Config) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.transformer = MoEGPT2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        router_noise: RouterNoise | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: object,
    ) -> MoECausalLMOutput:
        """Logits (B, L, V), decisions, and with `labels` (B, L) the losses.

        Labels are shifted inside; -100 is ignored. Tokens that `attention_mask` (B, L) masks do
        not count in the auxiliary losses, nor those that no query of a (B, 1, Q, past + L) mask
        sees. `router_noise` acts in training only. With `num_items_in_batch`, the labels of all
        micro-batches that are accumulated, `lm_loss` is the sum over these labels divided by it,
        and `loss` takes the auxiliary losses by the share of the labels that are here, so that both
        add up to the means over the whole batch. `kwargs` go to `MoEGPT2Model.forward`, which
        refuses those it does not know.
        """
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

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers' own, up to the last position.

        Raises:
            ValueError: for the token after it.
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        limit = self.config.max_position_embeddings
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        length = input_ids.shape[1] if mask is None else mask.shape[-1]
        # padding takes no position, and is worth waiting for the device only here
        if length > limit and positions is not None and int(positions.max()) >= limit:
            raise _too_long(f"{int(positions.max()) + 1} tokens", self.config)
        return inputs


def _too_long(given: str, config: MoEGPT2Config) -> ValueError:
    limit = config.max_position_embeddings
    return ValueError(
        f"{given}: the model has {limit} positions (n_positions), from 0; give at most {limit} "
        "tokens, in generate prompt and max_new_tokens together, or cut the text into parts"
    )

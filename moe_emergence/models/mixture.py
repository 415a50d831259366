"""What all models with mixture layers share, whatever family they come from.

Letters: B sequences, L tokens each, V vocabulary.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils.logging import get_logger

from moe_emergence.integrations.transformers import ImplementationDispatcher
from moe_emergence.models.card import write_card
from moe_emergence.models.configuration import MixtureConfig
from moe_emergence.models.outputs import MoECausalLMOutput
from moe_emergence.moe import (
    MoELayer,
    RouterDecision,
    RouterNoise,
    auxiliary_losses,
    routing_variance,
)
from moe_emergence.moe.dispatch import Dispatcher, get_dispatcher
from moe_emergence.moe.experts import Experts
from moe_emergence.moe.routing import TopKRouter
from moe_emergence.moe.tuning import TuningTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from emergence_kernels.activations import Activation

    _OfFamily = PreTrainedModel
else:
    _OfFamily = object

logger = get_logger(__name__)

_FORMER_NAMES = {rf"\.experts\.b{i}": f".experts.w{i}_bias" for i in (1, 2)}


def mixture_layer(
    config: Any, hidden_size: int, expert_size: int, activation: "Activation", index: int
) -> MoELayer:
    """The mixture in place of the MLP of layer `index`, as a `MixtureConfig` says."""
    return MoELayer(
        hidden_size,
        expert_size,
        config.num_experts,
        config.num_experts_per_tok,
        activation=activation,
        router=config.router,
        top1_weight=config.top1_weight,
        use_expert_bias=config.use_expert_bias,
        expert_bias_rate=config.expert_bias_rate,
        pools=config.pools(),
        layer=index,
    )


def run_mixture(
    block: Any,
    hidden_states: Tensor,
    router_noise: RouterNoise | None,
    token_ids: Tensor | None,
    cache: Cache | None,
) -> tuple[Tensor, RouterDecision]:
    """What a block's mixture makes of hidden states (B, L, H), and its decision.

    Raises:
        ValueError: for a cache, when the routers need the whole document.
    """
    if cache is not None and block.pool_size:
        raise ValueError(
            f"pool_size {block.pool_size}: experts depend on the whole document, and a cache does "
            "not hold it; give use_cache=False"
        )
    noise = router_noise and replace(router_noise, layer=block.layer_idx)
    mixed: tuple[Tensor, RouterDecision] = block.mlp(hidden_states, noise, token_ids)
    return mixed


class MixtureModel(_OfFamily):
    """Before a family's `PreTrainedModel`: weights of routers and experts, and ways to reach them.

    Blocks with a mixture have `is_moe` true, `layer_idx`, and the `MoELayer` in `mlp`.
    """

    _keep_in_fp32_modules_strict = ["expert_bias"]  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """As transformers' own; experts' biases are also read by the names b1 and b2."""
        options["key_mapping"] = _FORMER_NAMES | (options.get("key_mapping") or {})
        return super().from_pretrained(*args, **options)

    def save_pretrained(  # type: ignore[override]  # it has a dozen more that nobody needs here
        self, save_directory: Any, is_main_process: bool = True, **options: Any
    ) -> None:
        """As transformers' own, with a README.md that says what loads the folder."""
        if is_main_process:
            write_card(save_directory, self.config.model_type)
        super().save_pretrained(save_directory, is_main_process, **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, TopKRouter):
            init.normal_(module.weight, std=std)
            if module.expert_bias is not None:
                init.zeros_(module.expert_bias)
        elif isinstance(module, Experts):
            init.normal_(module.w1, std=std)
            init.normal_(module.w2, std=self._output_std())
            for bias in (module.w1_bias, module.w2_bias):
                if bias is not None:
                    init.zeros_(bias)

    def _output_std(self) -> float:
        """Standard deviation of new weights of an MLP's second projection."""
        std: float = self.config.initializer_range
        return std

    def moe_layers(self) -> dict[int, MoELayer]:
        """The mixture layers by their index in the model, out of whatever wraps them."""
        found = {}
        for block in self.modules():
            if getattr(block, "is_moe", False) is True:
                inner = (m for m in block.mlp.modules() if isinstance(m, MoELayer))  # type: ignore[union-attr]
                found[int(block.layer_idx)] = next(inner)  # type: ignore[arg-type]
        return found

    def activation_checkpointing_enable(  # type: ignore[override]  # it grows parameters
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute activations in the backward pass, see `PreTrainedModel`.

        Raises:
            ValueError: for reentrant checkpointing. It cuts the gradient of everything a block
                returns beside its hidden states: the auxiliary losses would train nothing.
        """
        if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "activation_checkpointing_kwargs use_reentrant=True: it would drop the gradients "
                "of the auxiliary losses; leave it out or give False"
            )
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def set_dispatch(self, name: str, table: TuningTable | None = None) -> None:
        """Send tokens through the dispatcher called `name` (see `get_dispatcher`) from now on."""
        self._take(get_dispatcher(name, table))
        self.config._experts_implementation_internal = "eager"

    def set_experts_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        """Send tokens through what transformers has registered under this name from now on.

        "eager" stands for this library's own choice, the dispatcher "auto".
        """
        super().set_experts_implementation(experts_implementation)
        self._take_implementation()

    def post_init(self) -> None:
        """As transformers' own, with the experts implementation of the configuration."""
        super().post_init()
        self._take_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As transformers' own, but "eager" where nothing was asked for."""
        name: str = super().get_correct_experts_implementation(requested_experts or "eager")
        return name

    def _take_implementation(self) -> None:
        name = self.config._experts_implementation
        self._take(get_dispatcher("auto") if name == "eager" else ImplementationDispatcher(name))

    def _take(self, dispatcher: Dispatcher) -> None:
        for module in self.modules():
            if isinstance(module, Experts):
                module.dispatcher = dispatcher


class MixtureHead(_OfFamily):
    """Before a family's language model: logits, decisions and losses, as its `forward` asks for."""

    # `num_items_in_batch`, which the stock Trainer gives
    accepts_loss_kwargs = True

    def _run(
        self,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        num_items_in_batch: int | Tensor | None,
        attention_mask: Tensor | None,
        **inputs: Any,
    ) -> MoECausalLMOutput:
        """See `MoEGPT2LMHeadModel.forward`; `inputs` are those of the model without the head."""
        outputs = self.base_model(attention_mask=attention_mask, **inputs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        losses = _losses(
            self, logits, labels, outputs.router_decisions, attention_mask, num_items_in_batch
        )
        return MoECausalLMOutput(
            **losses,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_decisions=outputs.router_decisions,
        )


def _losses(
    model: "PreTrainedModel",
    logits: Tensor,
    labels: Tensor | None,
    decisions: tuple[RouterDecision, ...],
    attention_mask: Tensor | None,
    num_items_in_batch: int | Tensor | None,
) -> dict[str, Tensor]:
    """`loss` and its parts of (B, L, V) logits, by their names in `MoECausalLMOutput`."""
    if labels is None:
        if num_items_in_batch is not None and decisions:
            logger.warning_once(
                "the labels were kept from the model, as by label smoothing: balance and z loss "
                "are not in the loss; leave label_smoothing_factor at 0, or add auxiliary_losses "
                "of router_decisions in a compute_loss_func"
            )
        return {}
    config: MixtureConfig = model.config  # type: ignore[assignment]
    counted = (labels[:, 1:] != -100).sum()
    # of a batch without labels the mean is 0, not NaN
    items = counted.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    lm_loss = model.loss_function(
        logits, labels, vocab_size=model.config.vocab_size, num_items_in_batch=items
    )
    if not decisions:
        return {"loss": lm_loss, "lm_loss": lm_loss}
    mask_T = _token_mask(attention_mask, labels.shape[1])
    lb_loss, z_loss = auxiliary_losses(decisions, mask_T)
    auxiliary = config.lb_coef * lb_loss + config.z_coef * z_loss
    parts = {"lm_loss": lm_loss, "lb_loss": lb_loss, "z_loss": z_loss}
    if config.variance_coef:
        parts["routing_variance"] = routing_variance(decisions, mask_T)
        auxiliary = auxiliary - config.variance_coef * parts["routing_variance"]
    if num_items_in_batch is not None:
        auxiliary = auxiliary * (counted / num_items_in_batch)
    return {"loss": lm_loss + auxiliary, **parts}


def _token_mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """(B*L,) which of the last `length` tokens count, from an attention mask over all keys."""
    if attention_mask is None:
        return None
    if attention_mask.ndim == 4:
        # true, or 0 where masks are added to the scores
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        attention_mask = seen.any(dim=2).any(dim=1)
    return attention_mask[:, -length:].reshape(-1)

"""Configurations of models with mixture-of-experts layers."""

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from moe_emergence.moe.pools import DocumentPools, check_pool_size
from moe_emergence.moe.routing import RouterKind, Top1Weight

TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
"""transformers' names for the activation of GPT-2's MLP."""
SILU = ("silu", "swish")
"""And for that of the gate in a SwiGLU MLP."""


def _expert_plan(experts: str, *parameters: str) -> dict[str, str]:
    """Of transformers' expert parallelism: whole experts on every process, tokens sent to them."""
    plan = {f"{experts}.{name}": "grouped_gemm" for name in parameters}
    return {**plan, experts: "ep_dispatch_experts"}


@dataclass(kw_only=True)
class MixtureConfig:
    """What a dense family's configuration gets on top: which layers are mixtures of experts.

    Attributes:
        moe_layers: indices of the layers whose MLP is a mixture.
        num_experts: E.
        num_experts_per_tok: K.
        router: "learned", "frozen" or "hash", see `moe_emergence.moe.routing`.
        top1_weight: "straight-through" or "probability", see `moe_emergence.moe.routing`.
        use_expert_bias: routers carry a selection-only bias.
        expert_bias_rate: how far it moves at every training pass, see `TopKRouter`.
        pool_size: experts that a document's tokens choose among, see `DocumentPools`. 0 for all.
        document_end: id of the token that ends a document, None for `eos_token_id`; one begins
            after `pad_token_id` too.
        lb_coef, z_coef: weights of the balance and z losses in the output's `loss`.
        variance_coef: weight of the routing variance that is taken off it, see `routing_variance`.

    The dispatcher is no part of it: it changes how fast the model runs, not what it computes.
    """

    keys_to_ignore_at_inference = [  # noqa: RUF012 - transformers reads a plain class attribute
        "cache",
        "lm_loss",
        "lb_loss",
        "z_loss",
        "routing_variance",
        "router_decisions",
    ]

    moe_layers: list[int] | tuple[int, ...] = ()
    num_experts: int = 8
    num_experts_per_tok: int = 1
    router: RouterKind = "learned"
    top1_weight: Top1Weight = "straight-through"
    use_expert_bias: bool = False
    expert_bias_rate: float = 0.001
    pool_size: int = 0
    document_end: int | None = None
    lb_coef: float = 0.01
    z_coef: float = 0.001
    variance_coef: float = 0.0

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]  # of the dense family
        self.moe_layers = sorted(self.moe_layers)
        if len(set(self.moe_layers)) < len(self.moe_layers):
            raise ValueError(f"moe_layers {self.moe_layers}: name each layer once")
        if self.router not in get_args(RouterKind):
            kinds = ", ".join(get_args(RouterKind))
            raise ValueError(f"router {self.router!r}: choose from {kinds}")
        if self.top1_weight not in get_args(Top1Weight):
            kinds = ", ".join(get_args(Top1Weight))
            raise ValueError(f"top1_weight {self.top1_weight!r}: choose from {kinds}")
        if self.moe_layers:
            self.check_mlp()
        layers: int = self.num_hidden_layers  # type: ignore[attr-defined]  # of the dense family
        outside = [i for i in self.moe_layers if not 0 <= i < layers]
        if outside:
            raise ValueError(
                f"moe_layers {self.moe_layers}: the model has layers 0 to {layers - 1}, "
                f"not {outside}"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok}: give a number from 1 to "
                f"num_experts ({self.num_experts})"
            )
        if self.pool_size:
            check_pool_size(
                self.pool_size,
                self.num_experts_per_tok,
                self.num_experts,
                self.router,
                self.use_expert_bias,
            )
            # there is nothing yet to keep the read part of a document in
            self.use_cache = False

    def pools(self) -> DocumentPools | None:
        """Of every mixture layer; padding in front of a document is none of it."""
        if not self.pool_size:
            return None
        dense: Any = self
        ends = dense.eos_token_id if self.document_end is None else self.document_end
        ids = ends if isinstance(ends, list) else [ends]
        found = {one for one in (*ids, dense.pad_token_id) if one is not None}
        return DocumentPools(self.pool_size, tuple(sorted(found)))

    def check_mlp(self) -> None:
        """Refuse an MLP that experts cannot be copies of."""


class MoEGPT2Config(MixtureConfig, GPT2Config):
    """A `GPT2Config` with mixture layers."""

    model_type = "moe_gpt2"
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
        "wte": "free_full_weight",
        "h.*": "free_full_weight",
        "ln_f": "keep_full_weight",
    }
    base_model_ep_plan: ClassVar[Any] = _expert_plan(
        "h.*.mlp.experts", "w1", "w1_bias", "w2", "w2_bias"
    )

    def check_mlp(self) -> None:
        """Experts have a tanh GELU."""
        if self.activation_function not in TANH_GELU:
            raise ValueError(
                f"activation_function {self.activation_function!r}: experts have a tanh GELU, "
                f"give {' or '.join(TANH_GELU)}"
            )


class SwiGLUMixtureConfig(MixtureConfig):
    """Of families whose MLP is `down(silu(gate(x)) * up(x))`."""

    output_router_decisions = True
    """Tells transformers' output capturing to collect them."""
    base_model_ep_plan: ClassVar[Any] = _expert_plan("layers.*.mlp.experts", "w1", "w2")
    hidden_act: str

    def check_mlp(self) -> None:
        """Experts are SwiGLU without biases."""
        if self.hidden_act not in SILU:
            raise ValueError(
                f"hidden_act {self.hidden_act!r}: experts are SwiGLU, give {' or '.join(SILU)}"
            )
        if getattr(self, "mlp_bias", False):
            raise ValueError("mlp_bias True: SwiGLU experts have no biases, give False")


class MoELlamaConfig(SwiGLUMixtureConfig, LlamaConfig):
    """A `LlamaConfig` with mixture layers."""

    model_type = "moe_llama"


class MoEMistralConfig(SwiGLUMixtureConfig, MistralConfig):
    """A `MistralConfig` with mixture layers."""

    model_type = "moe_mistral"


class MoEQwen2Config(SwiGLUMixtureConfig, Qwen2Config):
    """A `Qwen2Config` with mixture layers."""

    model_type = "moe_qwen2"


class MoEQwen3Config(SwiGLUMixtureConfig, Qwen3Config):
    """A `Qwen3Config` with mixture layers."""

    model_type = "moe_qwen3"

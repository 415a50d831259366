"""The model of a run."""

from dataclasses import dataclass
from typing import Literal

from moe_emergence.settings import check


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model: where the dense weights come from and which layers become mixtures of experts."""

    base: str = "gpt2"
    """Dense base: a hub id (gpt2), a folder with a GPT-2, Llama, Mistral, Qwen2 or Qwen3 model,
    "smollm2" (of a Python package), or "scratch" to pretrain a GPT-2 here."""
    n_layer: int = 12
    """Transformer layers of a base made from scratch."""
    n_embd: int = 768
    """Model width H of a base made from scratch."""
    n_head: int = 12
    """Attention heads of a base made from scratch."""
    dropout: float = 0.0
    """Dropout probability in embeddings, attention and residuals (0 keeps runs independent of how
    the batch is split over processes)."""
    moe_layers: tuple[int, ...] = (8, 9, 10, 11)
    """Layers whose MLP becomes a mixture of experts; none trains the dense model."""
    frozen_layers: int = 0
    """Lowest layers, and the embeddings, that are not trained (a base made from scratch is trained
    whole first); what they compute for a text is computed once and kept in --cache-dir."""
    num_experts: int = 8
    """Experts per converted layer."""
    top_k: int = 1
    """Experts per token."""
    upcycle_noise: float = 1e-3
    """Noise added to every copied expert parameter, in units of that parameter's standard
    deviation."""
    router: Literal["learned", "frozen", "hash"] = "learned"
    """Router: learned, frozen (never trained; random, it is the null model of a learned one) or
    hash (of the token id, a null model)."""
    router_init: Literal["random", "clusters", "domains"] = "random"
    """Where a router starts: at random, at the centres of clusters (k-means) of the base's own
    hidden states, so that experts begin with tokens that are alike, or (a positive control) told
    the domains by regression, which shares the experts out among them."""
    top1_weight: Literal["straight-through", "probability"] = "straight-through"
    """Weight of a top-1 expert's output: 1 with the gradient of the chosen probability, or that
    probability itself (arXiv 2101.03961)."""
    pool_size: int = 0
    """Experts that the tokens of a document choose among: those with the highest sums of
    probabilities over what has been read of it (arXiv 2605.06663, made causal). In training the
    size of every document's pool is drawn, from this to --num-experts, and generation goes without
    a cache. 0 leaves the choice among all experts."""
    expert_bias_rate: float = 0.0
    """Step of the loss-free balancing bias, used for selection only (arXiv 2408.15664); 0 turns it
    off."""

    def __post_init__(self) -> None:
        # decisions, metrics and figures come in the order of the model's layers
        object.__setattr__(self, "moe_layers", tuple(sorted(self.moe_layers)))
        check(self.n_layer >= 1, "--n-layer", self.n_layer, "give at least 1")
        check(self.n_head >= 1, "--n-head", self.n_head, "give at least 1")
        check(
            self.n_embd >= 1 and self.n_embd % self.n_head == 0,
            "--n-embd",
            self.n_embd,
            f"give a multiple of --n-head ({self.n_head})",
        )
        check(0 <= self.dropout < 1, "--dropout", self.dropout, "give a probability in [0, 1)")
        check(self.num_experts >= 1, "--num-experts", self.num_experts, "give at least 1")
        check(
            1 <= self.top_k <= self.num_experts,
            "--top-k",
            self.top_k,
            f"give a number from 1 to --num-experts ({self.num_experts})",
        )
        check(
            self.top1_weight == "straight-through" or (self.top_k == 1 and self.router != "hash"),
            "--top1-weight",
            self.top1_weight,
            "only a top-1 router with probabilities has it; give --top-k 1 and no hash router",
        )
        check(self.upcycle_noise >= 0, "--upcycle-noise", self.upcycle_noise, "give 0 or more")
        check(
            self.expert_bias_rate >= 0,
            "--expert-bias-rate",
            self.expert_bias_rate,
            "give 0 or more",
        )
        check(
            self.expert_bias_rate == 0 or self.router != "hash",
            "--expert-bias-rate",
            self.expert_bias_rate,
            "a hash router has no bias; give 0 or another --router",
        )
        check(
            self.router_init == "random" or self.router != "hash",
            "--router-init",
            self.router_init,
            "a hash router has no weights; give random or another --router",
        )
        check(
            self.pool_size == 0
            or (self.top_k <= self.pool_size <= self.num_experts and self.router != "hash"),
            "--pool-size",
            self.pool_size,
            f"give 0, or for no hash router a number from --top-k ({self.top_k}) to --num-experts "
            f"({self.num_experts})",
        )
        check(
            self.pool_size == 0 or self.expert_bias_rate == 0,
            "--pool-size",
            self.pool_size,
            "the bias of --expert-bias-rate would choose experts outside the pool; give 0 for one",
        )
        check(self.frozen_layers >= 0, "--frozen-layers", self.frozen_layers, "give 0 or more")
        check(
            self.frozen_layers == 0 or self.dropout == 0,
            "--frozen-layers",
            self.frozen_layers,
            f"what is kept of them would have --dropout {self.dropout:g}; give 0 for one of both",
        )
        check(
            not self.moe_layers or self.frozen_layers <= self.moe_layers[0],
            "--frozen-layers",
            self.frozen_layers,
            f"--moe-layers {' '.join(map(str, self.moe_layers))} must not be among them",
        )
        check(
            len(set(self.moe_layers)) == len(self.moe_layers),
            "--moe-layers",
            list(self.moe_layers),
            "name each layer once",
        )
        if self.base == "scratch":
            check_layers_exist(self, self.n_layer)


def check_layers_exist(model: ModelConfig, num_layers: int) -> None:
    """Refuse layers that a model of `num_layers` layers does not have."""
    moe_layers = model.moe_layers
    outside = [layer for layer in moe_layers if not 0 <= layer < num_layers]
    check(
        not outside,
        "--moe-layers",
        list(moe_layers),
        f"the model has layers 0 to {num_layers - 1}, not {outside}",
    )
    check(
        model.frozen_layers < num_layers,
        "--frozen-layers",
        model.frozen_layers,
        f"the model has {num_layers} layers; leave one to train",
    )

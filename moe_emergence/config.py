"""The configuration of a run: frozen dataclasses, checked when they are made.

The docstring under each field is its command-line help. Every field is a flag of the same name
(`max_steps` is `--max-steps`); a `ValueError` names the flag, what was given and what to change.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from moe_emergence.moe.dispatch import DispatchName
from moe_emergence.settings import check

DOMAINS = ("code", "math", "prose")


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


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data: where the three domains come from and how they become blocks of tokens."""

    data: str = "hub"
    """Source: "embedded" (text that ships with Python packages), "hub" (Hugging Face), or a folder
    with one file or sub-folder per domain, or with prepared blocks."""
    size_mb: float = 10.0
    """Text to read per domain, in megabytes (10^6 bytes of UTF-8)."""
    block_size: int = 512
    """Tokens per training sequence."""
    split_seed: int | None = None
    """Seed of the sources' order, the split and the blocks, so that runs of other seeds share them;
    none takes --seed."""
    balance_tokens: bool = True
    """Give every domain the same number of training blocks (shuffle, then truncate)."""
    near_duplicates: Literal["drop", "keep"] = "drop"
    """Training documents that are almost an evaluation document (Jaccard index of five-word
    shingles from 0.8 on): drop them, or keep and only count them."""
    tokenizer: str = "gpt2"
    """Tokenizer: "gpt2" (from the hub), "smollm2", a folder with a tokenizer, or "train"
    (byte-level BPE on the train split)."""
    vocab_size: int = 4096
    """Vocabulary of a tokenizer trained here, end-of-text token included."""
    text_field: str = "text"
    """Field that holds the text in jsonl and parquet files of a data folder."""
    hub_revision: tuple[str, ...] = ()
    """Hub revisions as domain=revision, for example code=main; a domain not named uses its default.
    """
    cache_dir: str = ".cache"
    """Folder for everything that is downloaded or trained once and reused."""

    def __post_init__(self) -> None:
        check(self.size_mb > 0, "--size-mb", self.size_mb, "give a positive number of megabytes")
        check(self.block_size >= 2, "--block-size", self.block_size, "give at least 2 tokens")
        check(
            self.vocab_size >= 257,
            "--vocab-size",
            self.vocab_size,
            "give at least 257 (256 bytes and the end-of-text token)",
        )
        check(
            self.split_seed is None or 0 <= self.split_seed < 2**31,
            "--split-seed",
            self.split_seed,
            "give a number from 0 to 2^31 - 1",
        )
        check(bool(self.data), "--data", repr(self.data), 'give "embedded", "hub" or a folder')
        for pair in self.hub_revision:
            domain, separator, revision = pair.partition("=")
            check(
                domain in DOMAINS and bool(separator) and bool(revision),
                "--hub-revision",
                pair,
                f"give domain=revision with a domain from {', '.join(DOMAINS)}",
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimisation: steps, batch, learning rate and the auxiliary losses."""

    max_steps: int = 10_000
    """Optimizer steps."""
    batch_size: int = 2
    """Sequences per micro-batch and process."""
    grad_accum_steps: int = 4
    """Micro-batches per optimizer step."""
    learning_rate: float = 5e-5
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.01
    """AdamW weight decay, on matrices only."""
    warmup_fraction: float = 0.1
    """Part of the steps over which the learning rate rises linearly; a cosine to zero follows."""
    router_learning_rate_scale: float = 1.0
    """Learning rate of the routers' weights, in units of --learning-rate."""
    freeze_router_after: int | None = None
    """Step after which the routers' weights stay what they are; none trains them to the end."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    lb_coef: float = 0.01
    """Weight of the load-balancing loss."""
    z_coef: float = 0.001
    """Weight of the router z-loss."""
    balance_scope: Literal["global", "micro"] = "global"
    """Batch the balance loss counts over: the whole optimizer step over all processes, or each
    micro-batch by itself."""
    noise_std: float = 0.1
    """Standard deviation of the router noise at step 0 (training only)."""
    noise_anneal_fraction: float = 0.25
    """Part of the steps over which the router noise falls linearly to zero."""
    precision: Literal["fp32", "bf16", "auto"] = "auto"
    """Arithmetic of the forward and backward pass; auto is bf16 on GPUs that have it and fp32
    elsewhere."""
    pretrain_steps: int = 0
    """Dense steps before upcycling when --base scratch."""
    pretrain_learning_rate: float = 1e-3
    """Peak learning rate of those dense steps."""
    compare_dense: bool = False
    """Also train the dense base on for the same steps on the same data, and compare per domain."""
    compare_null: bool = False
    """Also train the mixture with a random router that never learns for the same steps on the same
    data: what of a result does not come from where the router sends tokens."""

    def __post_init__(self) -> None:
        for flag, steps, least in (
            ("--max-steps", self.max_steps, 1),
            ("--batch-size", self.batch_size, 1),
            ("--grad-accum-steps", self.grad_accum_steps, 1),
            ("--pretrain-steps", self.pretrain_steps, 0),
        ):
            check(steps >= least, flag, steps, f"give at least {least}")
        after = self.freeze_router_after
        check(after is None or after >= 0, "--freeze-router-after", after, "give 0 or more")
        for flag, value in (
            ("--learning-rate", self.learning_rate),
            ("--pretrain-learning-rate", self.pretrain_learning_rate),
            ("--max-grad-norm", self.max_grad_norm),
        ):
            check(value > 0, flag, value, "give a positive number")
        for flag, value in (
            ("--weight-decay", self.weight_decay),
            ("--lb-coef", self.lb_coef),
            ("--z-coef", self.z_coef),
            ("--router-learning-rate-scale", self.router_learning_rate_scale),
            ("--noise-std", self.noise_std),
        ):
            check(value >= 0, flag, value, "give 0 or more")
        for flag, value in (
            ("--warmup-fraction", self.warmup_fraction),
            ("--noise-anneal-fraction", self.noise_anneal_fraction),
        ):
            check(0 <= value <= 1, flag, value, "give a fraction from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Monitoring: evaluation, checkpoints, router metrics and the collapse detector."""

    eval_every: int = 500
    """Steps between evaluations (the first and the last step are always evaluated)."""
    eval_blocks: int = 0
    """Evaluation blocks per domain; 0 uses all of them."""
    save_every: int = 500
    """Steps between checkpoints (the last step is always saved)."""
    keep_last_k: int = 3
    """Checkpoints to keep."""
    log_every: int = 10
    """Steps between writes of the metrics (every step has a row)."""
    log_router_every: int = 100
    """Steps between rows with every expert's fraction and every layer's entropy."""
    collapse_threshold: float = 0.6
    """Share of a layer's assignments above which one expert counts as collapsed."""
    collapse_checks: int = 3
    """Checks in a row above the threshold that make a collapse."""
    collapse_every: int = 100
    """Steps between collapse checks."""
    collapse_early_stop: bool = False
    """End the run at a collapse, with status collapsed."""
    track: Literal["none", "tensorboard", "wandb"] = "tensorboard"
    """Where metrics go besides metrics.jsonl; a tracker that fails warns and never stops training.
    """

    def __post_init__(self) -> None:
        for flag, value in (
            ("--eval-every", self.eval_every),
            ("--save-every", self.save_every),
            ("--keep-last-k", self.keep_last_k),
            ("--log-every", self.log_every),
            ("--log-router-every", self.log_router_every),
            ("--collapse-checks", self.collapse_checks),
            ("--collapse-every", self.collapse_every),
        ):
            check(value >= 1, flag, value, "give at least 1")
        check(self.eval_blocks >= 0, "--eval-blocks", self.eval_blocks, "give 0 (all) or more")
        check(
            0 < self.collapse_threshold <= 1,
            "--collapse-threshold",
            self.collapse_threshold,
            "give a fraction above 0 and at most 1",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Run: its name, place, seed and device."""

    preset: str
    """Settings to start from: demo, shakedown, dense, moe-main, no-lb or top2."""
    run_name: str
    """Name of the run; its folder is OUTPUT_DIR/RUN_NAME."""
    output_dir: str = "runs"
    """Folder that holds the run folders."""
    resume: str | None = None
    """Continue a run: "auto" takes the newest checkpoint of this run name if there is one, or give
    a checkpoint folder."""
    stop_after: int | None = None
    """End cleanly after this step, as an interruption would; --resume auto goes on from there."""
    seed: int = 42
    """Seed of everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto is cuda where there is one."""
    dispatch: DispatchName = "auto"
    """Path from tokens to experts and back; all of them compute the same."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """On a GPU, capture the whole optimizer step once and launch it with one call: auto where that
    can be done, on refuses to train where it cannot."""
    autotune: bool = False
    """On a GPU, measure kernel configurations and paths for this run's shape first; --cache-dir
    keeps them for later runs."""
    debug: bool = False
    """Show the traceback of an error."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        check(
            self.run_name.strip() not in ("", ".", "..") and "/" not in self.run_name,
            "--run-name",
            repr(self.run_name),
            "give a plain folder name",
        )
        check(0 <= self.seed < 2**31, "--seed", self.seed, "give a number from 0 to 2^31 - 1")
        check(
            self.stop_after is None or 1 <= self.stop_after <= self.optim.max_steps,
            "--stop-after",
            self.stop_after,
            f"give a step from 1 to --max-steps ({self.optim.max_steps})",
        )
        for group in (self.model, self.data, self.optim, self.monitor):
            for name, value in vars(group).items():
                finite = not isinstance(value, float) or math.isfinite(value)
                check(finite, "--" + name.replace("_", "-"), value, "give a finite number")
        for flag, value, neutral in (
            ("--router-learning-rate-scale", self.optim.router_learning_rate_scale, 1.0),
            ("--freeze-router-after", self.optim.freeze_router_after, None),
        ):
            check(
                value == neutral or self.model.router == "learned",
                flag,
                value,
                f"a {self.model.router} router is not trained; leave it out or give another "
                "--router",
            )
        check(
            self.model.base != "scratch"
            or not self.model.moe_layers
            or self.optim.pretrain_steps > 0,
            "--pretrain-steps",
            self.optim.pretrain_steps,
            "upcycling a base made from scratch needs dense steps first; give at least 1",
        )

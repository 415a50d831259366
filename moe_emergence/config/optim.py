"""The optimisation of a run."""

from dataclasses import dataclass
from typing import Literal

from moe_emergence.settings import check

MOST = 10**9
"""Steps, and sequences of a step, that anybody waits for."""


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
    variance_coef: float = 0.0
    """Weight of the variance loss, which rewards routers that tell tokens apart; 0 leaves
    it out."""
    balance_scope: Literal["global", "micro"] = "global"
    """Batch that the balance and variance losses count over: the whole optimizer step over all
    processes, or each micro-batch by itself."""
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
            check(steps <= MOST, flag, steps, f"give at most {MOST:,}")
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
            ("--variance-coef", self.variance_coef),
            ("--router-learning-rate-scale", self.router_learning_rate_scale),
            ("--noise-std", self.noise_std),
        ):
            check(value >= 0, flag, value, "give 0 or more")
        for flag, value in (
            ("--warmup-fraction", self.warmup_fraction),
            ("--noise-anneal-fraction", self.noise_anneal_fraction),
        ):
            check(0 <= value <= 1, flag, value, "give a fraction from 0 to 1")

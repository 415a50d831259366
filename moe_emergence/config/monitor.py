"""What is watched during a run."""

from dataclasses import dataclass
from typing import Literal

from moe_emergence.settings import check


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
    """Steps between rows with every expert's fraction and every layer's entropy; collapse checks
    have such rows too."""
    collapse_threshold: float = 0.6
    """Share of a layer's assignments above which one expert counts as collapsed."""
    collapse_checks: int = 3
    """Checks in a row above the threshold that make a collapse."""
    collapse_every: int = 100
    """Steps between collapse checks."""
    collapse_early_stop: bool = False
    """End the run at a collapse, with status collapsed."""
    track: Literal["none", "tensorboard", "trackio", "wandb"] = "tensorboard"
    """Where metrics go besides metrics.jsonl; a tracker that fails warns and never stops training.
    """
    live: bool = True
    """On a terminal, show under the progress bar how every mixture layer spreads its tokens over
    the experts, and its churn."""

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

"""The configuration of a run: frozen dataclasses, checked when they are made.

The docstring under each field is its command-line help. Every field is a flag of the same name
(`max_steps` is `--max-steps`); a `ValueError` names the flag, what was given and what to change.
"""

from dataclasses import dataclass, field
from typing import Literal

from moe_emergence.config.data import SHIPPED, DataConfig, TokenClass
from moe_emergence.config.model import ModelConfig, check_layers_exist
from moe_emergence.config.monitor import MonitorConfig
from moe_emergence.config.optim import OptimConfig
from moe_emergence.names import DispatchName
from moe_emergence.settings import check, check_plain

__all__ = [
    "SHIPPED", "DataConfig", "ModelConfig", "MonitorConfig", "OptimConfig", "RunConfig",
    "TokenClass", "check_layers_exist",
]  # fmt: skip


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
    """Measure how this machine best cuts and dispatches this run's shape first; --cache-dir keeps
    it for later runs."""
    fsdp_size: int = 1
    """Processes that share out one copy of weights, gradients and optimizer states (FSDP2); there
    are as many copies as groups of so many processes. 1 gives every process a copy."""
    ep_size: int = 1
    """Processes, of those of a copy, that keep different experts and send each other the tokens
    (expert parallelism). 1 gathers the experts for every layer instead."""
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
        self._check_sharding()
        check_plain(self)
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

    def _check_sharding(self) -> None:
        size, experts = self.ep_size, self.model.num_experts
        check(self.fsdp_size >= 1, "--fsdp-size", self.fsdp_size, "give at least 1")
        check(
            size >= 1 and self.fsdp_size % size == 0,
            "--ep-size",
            size,
            f"give a divisor of --fsdp-size ({self.fsdp_size})",
        )
        check(
            size == 1 or bool(self.model.moe_layers),
            "--ep-size",
            size,
            "a model without --moe-layers has no experts; give 1",
        )
        check(
            experts % size == 0, "--ep-size", size, f"give a divisor of --num-experts ({experts})"
        )
        check(
            self.fsdp_size == 1 or self.model.frozen_layers == 0,
            "--frozen-layers",
            self.model.frozen_layers,
            "layers that are passed over cannot be sharded; give 0, or --fsdp-size 1",
        )

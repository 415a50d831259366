"""Weights and gradients shared out over processes, by transformers' FSDP2 and expert parallelism.

The processes are replicas of `--fsdp-size` each. Within a replica every element of a parameter lies
on one process: experts whole on one of `--ep-size` processes (and split over those with the same
experts), all else split over the replica. Each process trains on its own share of the batch, as
without sharding.
"""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers.distributed.configuration_utils import DistributedConfig

from moe_emergence.config import RunConfig
from moe_emergence.models.families import FAMILIES
from moe_emergence.models.loading import LanguageModel
from moe_emergence.models.mixture import MixtureModel
from moe_emergence.moe import RouterDecision, RouterNoise
from moe_emergence.settings import check
from moe_emergence.training.objective import NextTokenLoss


def check_can_shard(config: RunConfig, accelerator: Accelerator) -> None:
    """Refuse `--fsdp-size` where the processes or the machine do not allow it."""
    size, processes = config.fsdp_size, accelerator.num_processes
    check(
        processes % size == 0,
        "--fsdp-size",
        size,
        f"give a divisor of the number of processes ({processes}), or start more with torchrun",
    )
    # transformers makes its meshes of the machine's accelerators
    found = torch.accelerator.current_accelerator(check_available=True)
    check(
        size == 1 or accelerator.device.type == ("cpu" if found is None else found.type),
        "--device",
        config.device,
        f"--fsdp-size {size} shards over accelerators, and this machine has some; leave one out",
    )


def shard(model: LanguageModel, config: RunConfig, accelerator: Accelerator) -> None:
    """Keep this process's share of `model`, the same on every process before, on its device.

    Raises:
        ValueError: for experts that cannot be shared out evenly.
    """
    layout = DistributedConfig(
        fsdp_size=config.fsdp_size,
        ep_size=config.ep_size,
        dp_replicate_size=accelerator.num_processes // config.fsdp_size,
    )
    sharded: Any = model
    if not isinstance(model, MixtureModel):
        layers = FAMILIES[type(model)].blocks.partition("{}")[0]
        sharded.fsdp_plan = {f"{layers}*": "free_full_weight"}
    layout, _, meshes = sharded.prepare_distribute_model(layout)
    sharded.maybe_distribute_model(sharded, layout, meshes)
    # one process saves what was gathered beforehand, and may not wait for the others in that
    sharded.config.distributed_config = None


class ShardedLoss(NextTokenLoss):
    """A `NextTokenLoss` of a sharded model, of which it calls parts and not the whole.

    What the whole model gathers for its own forward pass, the head among it, is there all the same.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model)
        whole: Any = model
        whole.next_token_loss = self._compute
        register_fsdp_forward_method(whole, "next_token_loss")

    def _compute(
        self, input_ids_BL: Tensor, router_noise: RouterNoise | None
    ) -> tuple[Tensor, tuple[RouterDecision, ...]]:
        losses_BL, decisions = super().forward(input_ids_BL, router_noise)
        # FSDP warns of views, whose hooks an operation in place would drop
        return losses_BL.clone(), decisions

    def forward(
        self, input_ids_BL: Tensor, router_noise: RouterNoise | None = None
    ) -> tuple[Tensor, tuple[RouterDecision, ...]]:
        """See `NextTokenLoss`; every process has to call it as often as the others."""
        model: Any = self.model
        losses: tuple[Tensor, tuple[RouterDecision, ...]]
        losses = model.next_token_loss(input_ids_BL, router_noise)
        return losses


class ShardedAccelerator(Accelerator):
    """An `Accelerator` for a sharded model, which reduces its own gradients.

    Args:
        fsdp_size: processes in a replica.
        options: of `Accelerator`.
    """

    def __init__(self, fsdp_size: int, **options: Any) -> None:
        super().__init__(**options)
        self.fsdp_size = fsdp_size

    def prepare_model(
        self,
        model: torch.nn.Module,
        device_placement: bool | None = None,
        evaluation_mode: bool = False,
    ) -> torch.nn.Module:
        """The model under autocast; it is neither moved nor replicated."""
        prepared: torch.nn.Module = super().prepare_model(model, False, evaluation_mode=True)
        return prepared

    def clip_grad_norm_(
        self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0
    ) -> Tensor:
        """Scale the gradient to a 2-norm of at most `max_norm`; its norm before that, a scalar.

        Parameters may lie on different meshes: processes add up the squares of their own shards.
        """
        assert norm_type == 2.0
        gradients: list[Any] = [p.grad for p in parameters if p.grad is not None]
        with torch.no_grad():
            shards = [gradient.to_local() for gradient in gradients]
        squares = torch.stack(torch._foreach_norm(shards)).square().sum()
        replicas = self.num_processes // self.fsdp_size
        norm: Tensor = (self.reduce(squares, "sum") / replicas).sqrt()
        torch._foreach_mul_(shards, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

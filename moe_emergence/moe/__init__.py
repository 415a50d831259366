"""The mixture-of-experts layer: routing, losses, experts and the paths between them."""

from moe_emergence.moe.dispatch import Dispatcher, get_dispatcher
from moe_emergence.moe.experts import Experts
from moe_emergence.moe.layer import MoELayer
from moe_emergence.moe.losses import (
    auxiliary_losses,
    load_balancing_loss,
    router_z_loss,
    routing_variance,
)
from moe_emergence.moe.noise import RouterNoise
from moe_emergence.moe.routing import HashRouter, RouterDecision, TopKRouter

__all__ = [
    "Dispatcher",
    "Experts",
    "HashRouter",
    "MoELayer",
    "RouterDecision",
    "RouterNoise",
    "TopKRouter",
    "auxiliary_losses",
    "get_dispatcher",
    "load_balancing_loss",
    "router_z_loss",
    "routing_variance",
]

"""What a training step costs on many GPUs, by how many of them share the experts: predicted.

Every rank has tokens of its own, and weights, gradients and moments are sharded over all N ranks
(arXiv 2304.11277): a block's weights are gathered before its forward and its backward pass, its
gradients scattered after. `ep` neighbouring ranks share the experts (arXiv 2006.16668): each has
E/ep of them, sharded over the N/ep ranks that have the same, and rows travel to their experts and
back, in both directions. Weights travel while the block computes; rows travel while it waits, and
everybody waits for the rank whose experts are chosen most.

Letters: N ranks, T tokens of a rank in one pass, H model width, F expert width, P pre-activation
width, E experts, K experts per token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moe_emergence.experiments.cluster import Cluster
from moe_emergence.experiments.model_shape import ModelShape
from moe_emergence.settings import check

SKEW = 0.35
"""Zipf's exponent of the experts' popularity: the fullest of 8 has 1.55 times the mean, as at the
end of `moe` in the suites `demo` (1.58) and `ablations` (1.53)."""

_WEIGHT, _CAST, _GRADIENT, _STATE = 4, 2, 4, 16
"""Bytes of a parameter when gathered, of its copy under autocast, and of its gradient when
scattered; and of what is kept in fp32: itself, its gradient, two moments."""
_DRAWS = 16

ExpertSeconds = Callable[[ModelShape, int, int, int], tuple[float, float]]
"""Forward and backward of the experts on one rank, from the shape, their rows, how many experts
they are, and how many of the rows are of one token."""


def kernel_seconds(shape: ModelShape, rows: int, experts: int, top_k: int) -> tuple[float, float]:
    """`ExpertSeconds` of the fused kernels on an H200 in bf16, by their time model.

    Raises:
        ValueError: without Triton, of whose kernels the model is.
    """
    try:
        from emergence_kernels.gpu.defaults import TARGETS, default_plan
        from emergence_kernels.gpu.gemm_config import rows_bucket
        from emergence_kernels.gpu.time_model import H200, Layer, layer_seconds
    except ImportError as error:
        raise ValueError(f"--gpus: the kernels' time model needs Triton ({error})") from error
    gated, bucket = shape.activation == "swiglu", rows_bucket(rows, experts)
    plan = default_plan(TARGETS["sm_90"], torch.bfloat16, "ieee", bucket, gated=gated)
    layer = Layer(rows, shape.hidden, shape.width, experts, shape.activation)
    parts = layer_seconds(layer, plan, H200, top_k)
    forward = sum(parts[name] for name in ("gather of x", "up", "down", "combine"))
    return forward, sum(parts.values()) - forward


@dataclass(frozen=True)
class LayerCost:
    """One direction of a kind of layer on the slowest rank."""

    count: int
    """Times in an optimizer step."""
    compute_s: float
    all_to_all_s: float
    weights_s: float
    """All-gathers and reduce-scatters."""

    @property
    def waiting_s(self) -> float:
        """What of `weights_s` is longer than the computing beside it."""
        return max(self.weights_s - self.compute_s, 0.0)


@dataclass(frozen=True)
class LayoutCost:
    """An optimizer step with the experts shared by `ep` ranks."""

    ep: int
    load: float
    """Rows of the rank that has most, over the mean."""
    layers: tuple[LayerCost, ...]
    update_s: float
    memory_bytes: float
    """Of a GPU, roughly."""

    @property
    def compute_s(self) -> float:
        """With the optimizer's update."""
        return sum(layer.count * layer.compute_s for layer in self.layers) + self.update_s

    @property
    def all_to_all_s(self) -> float:
        """With the wait for split sizes."""
        return sum(layer.count * layer.all_to_all_s for layer in self.layers)

    @property
    def weights_s(self) -> float:
        """All-gathers and reduce-scatters."""
        return sum(layer.count * layer.weights_s for layer in self.layers)

    @property
    def waiting_s(self) -> float:
        """What of `weights_s` no computing hides."""
        return sum(layer.count * layer.waiting_s for layer in self.layers)

    @property
    def step_s(self) -> float:
        """All of it."""
        return self.compute_s + self.all_to_all_s + self.waiting_s


def rank_rows(
    experts: int, ep: int, gpus: int, rows: int, skew: float, seed: int = 0
) -> NDArray[np.int64]:
    """(draws, N/ep, ep) rows that the ranks of every group get when each of them sends `rows`.

    The experts' popularity is Zipf's, in another order for every draw (a layer of a step). Rows are
    drawn independently, so that the K of a token may coincide.
    """
    generator = np.random.default_rng(seed)
    popularity = np.arange(1, experts + 1) ** -skew
    drawn = []
    for _ in range(_DRAWS):
        chances = generator.permutation(popularity).reshape(ep, -1).sum(1)
        drawn.append(generator.multinomial(ep * rows, chances / chances.sum(), gpus // ep))
    return np.stack(drawn)


def group_sizes(shape: ModelShape, cluster: Cluster) -> tuple[int, ...]:
    """Every `ep` that shares out both the ranks and the experts."""
    return tuple(size for size in cluster.groups if shape.experts % size == 0)


def layout_cost(
    shape: ModelShape,
    cluster: Cluster,
    ep: int,
    *,
    expert_seconds: ExpertSeconds = kernel_seconds,
    skew: float = SKEW,
) -> LayoutCost:
    """The step with the experts of every mixture layer shared by groups of `ep` ranks.

    Raises:
        ValueError: when experts or ranks cannot be shared so.
    """
    sizes = group_sizes(shape, cluster)
    known = " ".join(map(str, sizes))
    check(ep in sizes, "--ep", ep, f"{shape.experts} experts can be shared by one of {known} ranks")
    rows, here, row_bytes = shape.tokens * shape.top_k, shape.experts // ep, 2 * shape.hidden
    most = rank_rows(shape.experts, ep, cluster.gpus, rows, skew).max(axis=(1, 2))
    load = float(most.mean()) / rows
    exchange_s = 2 * cluster.exchange_s(load * rows * row_bytes, ep, min(ep, cluster.node))
    forward_s, backward_s = expert_seconds(
        shape, math.ceil(load * rows), here, 1 if ep > 1 else shape.top_k
    )
    sizes_s = order_s = 0.0
    if ep > 1:
        sizes_s = cluster.latency_s + cluster.sync_s
        # tokens become rows before they are sent, and tokens again when they are back
        order_s = 2 * row_bytes * (shape.tokens + rows) / cluster.memory_bytes_per_s
    products_s = shape.tokens / cluster.dense_flops_per_s
    router = shape.experts * shape.hidden
    layer = 2 * shape.attention_weights + shape.score_flops
    dense_s = products_s * (layer + 2 * shape.mlp_weights)
    mixed_s = products_s * (layer + 2 * router)
    ends_s = products_s * 2 * shape.vocabulary * shape.hidden

    def moved_s(weights: int, experts: int = 0) -> tuple[float, float]:
        """Of these weights in the forward and in the backward pass."""
        in_node = max(cluster.node // ep, 1)
        gather_s, scatter_s = (
            cluster.gather_s(size * weights, cluster.gpus, cluster.node)
            + cluster.gather_s(size * experts, cluster.gpus // ep, in_node)
            for size in (_WEIGHT, _GRADIENT)
        )
        return gather_s, gather_s + scatter_s

    dense = moved_s(shape.attention_weights + shape.mlp_weights)
    mixed = moved_s(shape.attention_weights + router, here * shape.mlp_weights)
    ends = moved_s(shape.end_weights)
    mixtures, others = shape.passes * shape.mixture_layers, shape.passes * shape.dense_layers
    layers = (
        LayerCost(others, dense_s, 0.0, dense[0]),
        LayerCost(others, 2 * dense_s, 0.0, dense[1]),
        LayerCost(mixtures, mixed_s + forward_s + order_s, exchange_s + sizes_s, mixed[0]),
        LayerCost(mixtures, 2 * mixed_s + backward_s + order_s, exchange_s, mixed[1]),
        LayerCost(shape.passes, ends_s, 0.0, ends[0]),
        LayerCost(shape.passes, 2 * ends_s, 0.0, ends[1]),
    )
    update_s = cluster.update_s * shape.weights / cluster.gpus
    return LayoutCost(ep, load, layers, update_s, _memory_bytes(shape, cluster, ep, load))


def _memory_bytes(shape: ModelShape, cluster: Cluster, ep: int, load: float) -> float:
    """Weights, gradients and moments; what of them is gathered; activations and logits.

    A token has 16 H bytes in a layer's attention and norms and 2 (H + P + F) for every row in an
    MLP, in a dense GPT-2 the 34 H of arXiv 2205.05198; rows that travel are there twice more.
    """
    row = 2 * (shape.hidden + shape.pre_width + shape.width)
    routed = shape.top_k * (load * row + (4 * shape.hidden if ep > 1 else 0))
    layers = shape.dense_layers + shape.mixture_layers
    mlps = shape.dense_layers * row + shape.mixture_layers * routed
    token = layers * 16 * shape.hidden + mlps + 4 * shape.vocabulary
    experts = shape.experts // ep * shape.mlp_weights
    largest = max(shape.attention_weights + experts, shape.end_weights)
    # two blocks' weights, and of one the copy and the gradients
    gathered = largest * (2 * _WEIGHT + _CAST + _GRADIENT) if cluster.gpus > 1 else 0
    return _STATE * shape.weights / cluster.gpus + gathered + shape.tokens * token

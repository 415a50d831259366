"""From a suite to the best layout of its mixtures on many GPUs, as tables and sentences."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from rich.table import Table

from moe_emergence.config import RunConfig
from moe_emergence.experiments.cluster import LINK_SHARE, Cluster
from moe_emergence.experiments.model_shape import ModelShape, shape_of
from moe_emergence.experiments.parallel_cost import LayoutCost, group_sizes, layout_cost
from moe_emergence.settings import check

_WORTH = 1.05
"""Times as fast that a layout has to be; what is nearer is within the model's error."""
_MOST_EXPERTS = 8192

CAPTION = (
    "Predicted, unmeasured: nothing has run on more than one GPU. Milliseconds; step = compute + "
    "exchange (all-to-alls) + wait (the part of weights, their all-gathers and reduce-scatters, "
    "that no computing hides). Load: of the fullest rank over the mean. Speed: over ep = 1. "
    f"Computing by models fitted to one H200, links at {LINK_SHARE:.0%} of their data sheets, "
    "without the host's own time."
)


def distinct_shapes(configs: Mapping[str, RunConfig]) -> dict[ModelShape, list[str]]:
    """The shapes among runs with mixture layers, and the names of those that have them.

    Raises:
        ValueError: for a run in fp32, of which there is no model.
    """
    found: dict[ModelShape, list[str]] = {}
    for name, config in configs.items():
        if config.model.moe_layers:
            precision = config.optim.precision
            check(precision != "fp32", "--precision", precision, f"--gpus needs bf16 for {name}")
            found.setdefault(shape_of(config), []).append(name)
    return found


def compare(shape: ModelShape, cluster: Cluster, ep: int | None = None) -> list[LayoutCost]:
    """Without expert parallelism, and with every `ep` there can be, or with the one given.

    Raises:
        ValueError: when experts or GPUs cannot be shared by `ep`.
    """
    sizes = group_sizes(shape, cluster) if ep is None else sorted({1, ep})
    return [layout_cost(shape, cluster, size) for size in sizes]


def fastest(layouts: Sequence[LayoutCost], cluster: Cluster) -> LayoutCost | None:
    """Of those that a GPU has memory for."""
    fitting = [found for found in layouts if found.memory_bytes <= cluster.memory_bytes]
    return min(fitting, key=lambda found: found.step_s, default=None)


def _gain(layouts: Sequence[LayoutCost], cluster: Cluster) -> float:
    """Times as fast as without expert parallelism the best layout with it is."""
    with_it = fastest([found for found in layouts if found.ep > 1], cluster)
    without = fastest([found for found in layouts if found.ep == 1], cluster)
    if with_it is None:
        return 0.0
    return float("inf") if without is None else without.step_s / with_it.step_s


def pays_from(shape: ModelShape, cluster: Cluster, ep: int | None = None) -> int | None:
    """The least experts from which on expert parallelism pays, as long as a GPU has the memory.

    Tried are the shape's own experts, doubled and halved.
    """
    experts = shape.experts
    while experts % 2 == 0:
        experts //= 2
    first = None
    while experts <= max(_MOST_EXPERTS, shape.experts):
        changed = dataclasses.replace(shape, experts=experts)
        if experts >= shape.top_k and ep in (None, *group_sizes(changed, cluster)):
            layouts = compare(changed, cluster, ep)
            if fastest(layouts, cluster) is None:
                break
            if _gain(layouts, cluster) < _WORTH:
                first = None
            elif first is None:
                first = experts
        experts *= 2
    return first


def verdict(
    shape: ModelShape, cluster: Cluster, layouts: Sequence[LayoutCost], ep: int | None = None
) -> str:
    """Whether expert parallelism pays, and from how many experts on, in plain words."""
    best, gain, without = fastest(layouts, cluster), _gain(layouts, cluster), layouts[0]
    parallel = [found for found in layouts if found.ep > 1]
    if best is None:
        return f"No layout fits into {cluster.memory_bytes / 1e9:,.0f} GB a GPU: give more --gpus."
    if not parallel:
        return f"{cluster.gpus} GPUs cannot share {shape.experts} experts in whole ones."
    if math.isinf(gain):
        said = (
            f"Expert parallelism is needed: without it a GPU takes "
            f"{without.memory_bytes / 1e9:,.0f} GB. ep = {best.ep} is fastest."
        )
    elif gain >= _WORTH:
        said = f"Expert parallelism pays: ep = {best.ep} is {gain:.3g} times as fast as ep = 1."
    elif gain > 1 / _WORTH:
        said = "Expert parallelism makes no difference that this model can tell (5%)."
    else:
        other = min(parallel, key=lambda found: found.step_s)
        cost = other.compute_s + other.all_to_all_s - without.compute_s
        saved = without.waiting_s - other.waiting_s
        said = (
            f"Expert parallelism does not pay: with ep = {other.ep} exchange and the fullest rank "
            f"cost {1e3 * cost:.1f} ms, and {1e3 * saved:.1f} ms of waiting for weights are saved."
        )
    first = pays_from(shape, cluster, ep)
    onward = f"from {first:,} experts on" if first else "at no number of experts that fits"
    return f"{said} With layers and batches of this size on {cluster.gpus} GPUs it pays {onward}."


def layout_table(
    names: Sequence[str], shape: ModelShape, cluster: Cluster, layouts: Sequence[LayoutCost]
) -> Table:
    """The layouts of one shape for a terminal."""
    title = (
        f"{', '.join(names)}: {shape.experts:,} experts of {shape.hidden} x {shape.width}, top "
        f"{shape.top_k}, in {shape.mixture_layers} layers; {shape.tokens * shape.passes:,} tokens "
        f"a GPU and step, {cluster.gpus} GPUs in nodes of {cluster.node}: predicted, unmeasured"
    )
    table = Table(title=title, title_justify="left", caption=CAPTION, caption_justify="left")
    for column in ("ep", "load", "compute", "exchange", "weights", "wait", "step", "speed", "GB"):
        table.add_column(column, justify="right")
    best = fastest(layouts, cluster)
    for found in layouts:
        parts = (found.compute_s, found.all_to_all_s, found.weights_s, found.waiting_s)
        table.add_row(
            str(found.ep),
            f"{found.load:.2f}",
            *(f"{1e3 * seconds:,.1f}" for seconds in (*parts, found.step_s)),
            f"{layouts[0].step_s / found.step_s:.2f}",
            f"{found.memory_bytes / 1e9:,.1f}"
            + ("" if found.memory_bytes <= cluster.memory_bytes else " (too much)"),
            style="bold" if found is best else None,
        )
    return table

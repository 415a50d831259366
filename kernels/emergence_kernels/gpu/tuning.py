"""Choosing configurations by measurement, for one shape of the expert MLP.

A candidate is timed only after its results agreed with those of the default configuration, so a
miscompiled one can never be chosen. Letters: T tokens, H model width, F expert width, E experts,
K experts per token, S = T*K routed rows.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

from ..activations import Activation, pre_activation_width
from ..permutation import sort_by_expert
from .compiling import CompileJob, compile_in_parallel
from .defaults import Target, candidates, default_plan, target_of
from .gemm_config import PRODUCTS, GemmConfig, GemmPlan, Product, rows_bucket
from .launch import matmul_precision, recorded_launches
from .row_product import row_product
from .up_projection import up_projection
from .weight_gradient import weight_gradient

_log = logging.getLogger(__name__)

Run = Callable[[GemmConfig], tuple[Tensor, ...]]


@dataclass(frozen=True)
class MLPShape:
    """The sizes that configurations are chosen for."""

    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int
    activation: Activation
    dtype: torch.dtype


@dataclass(frozen=True)
class Tuned:
    """What was measured for one product."""

    product: Product
    config: GemmConfig
    milliseconds: float
    default_milliseconds: float


def tune(
    shape: MLPShape,
    device: torch.device,
    measure: Callable[[Callable[[], object]], float] = do_bench,
) -> Iterator[Tuned]:
    """The fastest configuration of every product, one after another, on random balanced routing.

    Args:
        shape: sizes and dtype.
        device: where to measure.
        measure: milliseconds that a call takes.
    """
    target = target_of(device)
    bucket = rows_bucket(shape.tokens * shape.top_k, shape.experts)
    runs, precision = product_runs(shape, device)
    gated = shape.activation == "swiglu"
    default = default_plan(target, shape.dtype, precision, bucket, gated=gated)
    others = {
        p: candidates(p, target, shape.dtype, bucket, precision=precision, gated=gated)
        for p in PRODUCTS
    }
    if device.type == "cuda":
        _compile(runs, others, target)
    for product in PRODUCTS:
        run: Run = runs[product]
        start: GemmConfig = getattr(default, product)
        expected = run(start)
        best = Tuned(product, start, *[_time(run, start, measure)] * 2)
        for config in others[product]:
            if not agrees(product, config, run, expected):
                continue
            milliseconds = _time(run, config, measure)
            if milliseconds < best.milliseconds:
                best = dataclasses.replace(best, config=config, milliseconds=milliseconds)
        yield best


def _compile(
    runs: dict[Product, Run], configs: dict[Product, list[GemmConfig]], target: Target
) -> None:
    """Compile every candidate with all cores; one that fails is passed over where it is tried."""
    with recorded_launches() as recorded:
        for product, candidates_of_product in configs.items():
            for config in candidates_of_product:
                runs[product](config)
    jobs = {job.key(): job for job in (CompileJob.of(launch, target) for launch in recorded)}
    failed = 0
    for outcome in compile_in_parallel([*jobs.values()], os.cpu_count() or 1):
        failed += isinstance(outcome, str)
    _log.info("compiled %d configurations, %d failed", len(jobs), failed)


def plan_of(tuned: list[Tuned]) -> GemmPlan:
    """The plan of five tuned products."""
    return GemmPlan(**{t.product: t.config for t in tuned})


def _time(run: Run, config: GemmConfig, measure: Callable[[Callable[[], object]], float]) -> float:
    return measure(lambda: run(config))


def agrees(product: Product, config: GemmConfig, run: Run, expected: tuple[Tensor, ...]) -> bool:
    """Whether a configuration compiles, fits, and computes what the default one does.

    Both accumulate in fp32 and round once, so that two results differ by an ulp where they round
    differently and by the sums' own error, bounded here by 64 fp32 ulps of the largest value.
    """
    try:
        found = run(config)
    # RuntimeError: what Triton's driver raises for a launch that fails
    except (CompilationError, OutOfResources, PTXASError, RuntimeError) as error:
        _log.info("%s does not take %s: %s", product, config, str(error).splitlines()[0])
        return False
    for ours, theirs in zip(found, expected, strict=True):
        largest = float(theirs.abs().max()) if theirs.numel() else 0.0
        bound = largest * (2 * torch.finfo(ours.dtype).eps + 64 * torch.finfo(torch.float32).eps)
        if not float((ours.float() - theirs.float()).abs().max()) <= bound:
            _log.warning("%s computes something else with %s; not used", product, config)
            return False
    return True


def product_runs(shape: MLPShape, device: torch.device) -> tuple[dict[Product, Run], str]:
    """What to run for each product, on random numbers, and the precision it runs in."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device).to(shape.dtype)

    tokens, hidden, width, experts = shape.tokens, shape.hidden, shape.width, shape.experts
    pre_width = pre_activation_width(shape.activation, width)
    scores_TE = torch.rand(tokens, experts, generator=generator, device=device)
    permutation = sort_by_expert(scores_TE.topk(shape.top_k, dim=1).indices, experts)
    offsets = permutation.expert_offsets
    rows = tokens * shape.top_k
    x_SH, act_SF, pre_SP = (randn(rows, n) for n in (hidden, width, pre_width))
    w1_EHP = randn(experts, hidden, pre_width) / hidden**0.5
    w2_EFH = randn(experts, width, hidden) / width**0.5
    b1_EP, b2_EH = randn(experts, pre_width), randn(experts, hidden)
    precision = matmul_precision(x_SH)

    def back(x: Tensor, w: Tensor) -> Run:
        return lambda c: (row_product(x, w, None, offsets, c, precision, transposed=True),)

    return {
        "up": lambda c: up_projection(x_SH, w1_EHP, b1_EP, offsets, shape.activation, c, precision),
        "down": lambda c: (row_product(act_SF, w2_EFH, b2_EH, offsets, c, precision),),
        "activation_grad": back(x_SH, w2_EFH),
        "input_grad": back(pre_SP, w1_EHP),
        "weight_grad": lambda c: (
            # as under autocast, where most training is
            weight_gradient(x_SH, pre_SP, offsets, c, precision, torch.float32),
        ),
    }, precision

"""Configurations that load through tensor descriptors compute what plain loads do."""

from dataclasses import replace

import pytest
import torch
from conftest import KERNEL_DEVICE

pytest.importorskip("triton", reason="the kernels need Triton, which is not installed")

from emergence_kernels import sort_by_expert
from emergence_kernels.activations import Activation, pre_activation_width
from emergence_kernels.gpu import expert_mlp
from emergence_kernels.gpu.gemm_config import GemmConfig, GemmPlan
from emergence_kernels.gpu.launch import recorded_launches

PLAIN = GemmConfig(16, 16, 16, warps=4, stages=2, group_m=2)
DESCRIBED = {
    "descriptors": replace(PLAIN, tma=True),
    "persistent, specialized": replace(PLAIN, tma=True, persistent=True, specialize=True),
}

SHAPES = {
    "whole tiles, an expert without rows": (3, 16, 16, 3, 1),
    "widths that end inside a tile": (9, 24, 40, 3, 2),
    "rows that are not aligned, so plain loads": (4, 5, 9, 2, 1),
}
"""T, H, F, E, K."""


def run(
    shape: tuple[int, ...], activation: Activation, config: GemmConfig, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Output and gradients from inputs that only depend on the shape."""
    tokens, hidden, width, experts, top_k = shape
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(KERNEL_DEVICE, dtype)

    pre_width = pre_activation_width(activation, width)
    chosen = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    permutation = sort_by_expert(chosen.to(KERNEL_DEVICE), experts)
    x, weights, dy = random(tokens, hidden), random(tokens, top_k), random(tokens, hidden)
    w1, b1 = random(experts, hidden, pre_width), random(experts, pre_width)
    w2, b2 = random(experts, width, hidden), random(experts, hidden)
    plan = GemmPlan(*[config] * 5)
    y, pre = expert_mlp.forward(x, weights, w1, b1, w2, b2, permutation, activation, plan)
    gradients = expert_mlp.backward(
        dy, x, weights, w1, w2, b2, pre, permutation, activation, x.dtype, plan,
        (True,) * 6,
    )  # fmt: skip
    return [y, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_descriptors_load_the_same_tiles(
    shape: tuple[int, ...], activation: Activation, dtype: torch.dtype
) -> None:
    """A weight of IEEE fp32 is transposed before, one of 16 bits as it is loaded."""
    expected = run(shape, activation, PLAIN, dtype)
    relative = max(1e-5, torch.finfo(dtype).eps)
    configs = [*DESCRIBED.values()]
    if KERNEL_DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < 10:
        # where nothing chooses to specialize warps, Triton fails to for tiles this small
        configs = [replace(config, specialize=False) for config in configs]
    results = [run(shape, activation, config, dtype) for config in configs]
    for result in results:
        for found, wanted in zip(result, expected, strict=True):
            torch.testing.assert_close(
                found, wanted, rtol=relative, atol=1e-5 * float(wanted.abs().max())
            )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_descriptors_are_used_where_rows_are_aligned(shape: tuple[int, ...]) -> None:
    with recorded_launches() as launches:
        run(shape, "gelu_tanh", DESCRIBED["descriptors"], torch.float32)
    used = [launch.options["TMA"] for launch in launches if "TMA" in launch.options]
    aligned = shape[1] % 4 == 0
    has_descriptors = KERNEL_DEVICE == "cpu" or torch.cuda.get_device_capability()[0] >= 9
    assert used == [aligned and has_descriptors] * 6


def test_specializing_needs_descriptors() -> None:
    with pytest.raises(AssertionError, match="needs tma"):
        replace(PLAIN, specialize=True)

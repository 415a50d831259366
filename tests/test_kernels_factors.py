"""Factors in tf32: rounded to nearest before the matrix units drop their low bits."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import KERNEL_DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from kernel_cases import ACTIVATIONS, Shape, by_kernels, make_case

from emergence_kernels.gpu import expert_mlp
from emergence_kernels.gpu.factors import as_factor


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def nearest(x: Tensor) -> Tensor:
    """Ten bits after the leading one, ties to even, by arithmetic; exponents as fp32 has them."""
    x = x.double()
    exponent = torch.frexp(x)[1].clamp(min=-125).double()
    unit = torch.exp2(exponent - 11)
    rounded = torch.round(x / unit) * unit
    return torch.where(x.isfinite(), rounded, x).float()


def is_tf32(x: Tensor) -> bool:
    return not (x.contiguous().view(torch.int32) & 0x1FFF).any()


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
@settings(max_examples=60)
def test_any_number_becomes_the_nearest(values: list[float]) -> None:
    x = torch.tensor(values, device=KERNEL_DEVICE)
    torch.testing.assert_close(as_factor(x, "tf32"), nearest(x), rtol=0, atol=0, equal_nan=True)


def test_ties_edges_and_what_is_no_number() -> None:
    unit = 2.0**-10
    ties = [1 + unit / 2, 1 + 3 * unit / 2, -1 - unit / 2, -1 - 3 * unit / 2]
    edges = [torch.finfo(torch.float32).max, 2.0**-126, 2.0**-149, 3 * 2.0**-149, 0.0, -0.0]
    x = torch.tensor([*ties, *edges, float("inf"), float("-inf")])
    x = torch.cat([x, torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(x.dtype)])
    found = as_factor(x.to(KERNEL_DEVICE), "tf32").cpu()
    expected = [1.0, 1 + 2 * unit, -1.0, -1 - 2 * unit, float("inf"), 2.0**-126, 0, 0, 0, 0]
    assert found[:12].tolist() == [*expected, float("inf"), float("-inf")]
    assert found[12:].isnan().all()


def test_only_tf32_and_only_where_asked() -> None:
    x = torch.randn(3000).to(KERNEL_DEVICE)
    kept = x.clone()
    assert as_factor(x, "ieee") is x
    rounded = as_factor(x, "tf32")
    assert torch.equal(x, kept)
    assert not torch.equal(rounded, x)
    assert as_factor(x, "tf32", in_place=True) is x
    assert torch.equal(x, rounded)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_factor_of_every_product_is_rounded(
    activation: Any, tf32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(product: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(a: Tensor, b: Tensor, *others: Any, **options: Any) -> Any:
            seen.append((name, is_tf32(a), is_tf32(b)))
            return product(a, b, *others, **options)

        return run

    for name in ("up_projection", "row_product", "weight_gradient"):
        monkeypatch.setattr(expert_mlp, name, watched(getattr(expert_mlp, name), name))
    case = make_case(Shape(20, 24, 24, 3, 2, activation=activation))
    inputs = [t.clone() for t in case[:7] if t is not None]
    by_kernels(case)
    assert len(seen) == 6
    assert all(a and b for _, a, b in seen), seen
    assert all(torch.equal(a, b) for a, b in zip(inputs, filter_none(case[:7]), strict=True))


def filter_none(tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rounding_errors_have_no_sign(activation: Any, tf32: None) -> None:
    """They do not add up as dropped bits do; and sums that are no products are those of fp32."""
    case = make_case(Shape(40, 64, 96, 3, 1, activation=activation))
    rounded = by_kernels(case)
    torch.set_float32_matmul_precision("highest")
    exact = by_kernels(case)
    for name in ("y", "x", "weights", "w1", "w2"):
        error = (rounded[name] - exact[name]).double()
        scale = exact[name].double().square().mean().sqrt()
        # a factor's own is 2**-11 / sqrt(3), and every product has two
        assert 1e-5 * scale < error.square().mean().sqrt() < 6e-4 * scale, name
    if activation == "gelu_tanh":
        assert torch.equal(rounded["b2"], exact["b2"])


def test_shapes_without_numbers(tf32: None) -> None:
    case = make_case(Shape(0, 9, 5, 3, 1))
    assert by_kernels(case)["y"].shape == (0, 9)

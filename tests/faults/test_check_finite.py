"""The layer's checks: what is not finite is refused by name, and what is finite is routed."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import ids, make_model

from moe_emergence.moe import MoELayer

LARGEST = 65504.0
"""Of fp16."""


def make_layer(dtype: torch.dtype, **options: Any) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(16, 32, 4, 2, layer=7, **options)
    with torch.no_grad():
        layer.router.weight.mul_(50)
    return layer.to(dtype)


def said(what: str, bad: int, rows: int, first: int) -> str:
    found = f"layer 7: the {what} is not finite in {bad} of {rows} rows (torch."
    return f"^{re.escape(found)}\\w+\\), first in row {first}$"


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 9), min_size=1, unique=True),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from(["learned", "frozen"]),
)
def test_rows_that_are_not_finite_are_counted(
    bad: list[int], value: float, dtype: torch.dtype, router: str
) -> None:
    layer = make_layer(dtype, router=router, check_finite=True)
    x_TH = torch.randn(10, 16, dtype=dtype)
    layer(x_TH)
    for row in bad:
        x_TH[row, 3] = value
    with pytest.raises(FloatingPointError, match=said("input", len(bad), 10, min(bad))):
        layer(x_TH.view(2, 5, 16))
    layer.check_finite = False
    layer(x_TH)


@settings(max_examples=30)
@given(st.floats(0, LARGEST), st.integers(0, 2**31 - 1))
def test_every_finite_input_in_16_bits_has_finite_logits(norm: float, seed: int) -> None:
    """In fp16 the products with such inputs are not: the router's are in fp32."""
    layer = make_layer(torch.float16)
    generator = torch.Generator().manual_seed(seed)
    x_TH = (torch.rand(6, 16, generator=generator) * 2 - 1).mul(norm).half()
    decision = layer.router(x_TH)
    for found in (decision.router_logits, decision.router_probs, decision.topk_weights):
        assert found.isfinite().all()
    w_EH = layer.router.weight.double()
    error_TE = (decision.router_logits.double() - x_TH.double() @ w_EH.T).abs()
    assert (error_TE <= 16 * 2**-23 * (x_TH.double().abs() @ w_EH.abs().T)).all()


def test_experts_that_overflow_in_fp16_are_named() -> None:
    layer = make_layer(torch.float16, check_finite=True, dispatch="sequential")
    x_TH = torch.zeros(3, 16, dtype=torch.float16)
    x_TH[1] = LARGEST
    with torch.no_grad():
        layer.experts.w1.fill_(1.0)
    with pytest.raises(FloatingPointError, match=said("experts' output", 1, 3, 1)):
        layer(x_TH)


def test_logits_that_overflow_are_named() -> None:
    layer = make_layer(torch.float32, check_finite=True)
    with torch.no_grad():
        layer.router.weight[2] = 3e38
    with pytest.raises(FloatingPointError, match=said("router's logits", 2, 2, 0)):
        layer(torch.full((2, 16), 2.0))


def test_of_a_model_the_layer_is_its_index() -> None:
    model: Any = make_model()
    for layer in model.moe_layers().values():
        layer.check_finite = True
    model(ids())
    with torch.no_grad():
        model.transformer.h[1].mlp.experts.w2_bias[:] = torch.nan
    with pytest.raises(FloatingPointError, match=r"^layer 1: the experts' output .* 36 of 36 rows"):
        model(ids())

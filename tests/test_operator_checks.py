"""Operands that cannot be used are refused by name, on every way to an operator.

One operand without memory used to choose the kernel for shapes, whose results are uninitialised.
Letters: see `emergence_kernels.reference`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import randn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import emergence_kernels
from emergence_kernels import sort_by_expert

T, K, H, F, E = 6, 2, 4, 5, 3
MLP = ("x", "weights", "w1", "b1", "w2", "b2", "perm", "inv_perm", "token_idx", "expert_offsets",
       "activation", "plan")  # fmt: skip


def mlp_operands() -> dict[str, Any]:
    chosen = torch.rand(T, E, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :K]
    tensors = (
        randn(T, H), randn(T, K), randn(E, H, F), randn(E, F), randn(E, F, H), randn(E, H),
        *sort_by_expert(chosen, E),
    )  # fmt: skip
    return dict(zip(MLP, (*tensors, "gelu_tanh", ""), strict=True))


def backward_operands() -> dict[str, Any]:
    given = mlp_operands()
    dy, pre = {"dy": randn(T, H)}, {"pre": randn(T * K, F)}
    parts = list(given.items())
    return {**dy, **dict(parts[:6]), **pre, **dict(parts[6:]), "wanted": [True] * 6}


def route_operands() -> dict[str, Any]:
    return {"logits": randn(T, E), "top_k": K, "noise": randn(T, E), "expert_bias": randn(E)}


OPERATORS: dict[str, Callable[[], dict[str, Any]]] = {
    "expert_mlp": mlp_operands,
    "expert_mlp_backward": backward_operands,
    "route": route_operands,
}


def call(name: str, operands: dict[str, Any]) -> Any:
    return getattr(torch.ops.emergence_kernels, name)(*operands.values())


EACH = [(name, key) for name, make in OPERATORS.items() for key, value in make().items()
        if isinstance(value, Tensor)]  # fmt: skip


@pytest.mark.parametrize(("name", "key"), EACH)
def test_an_operand_on_another_device_is_refused(name: str, key: str) -> None:
    operands = OPERATORS[name]()
    call(name, operands)
    operands[key] = operands[key].to("meta")
    message = rf"emergence_kernels::{name}: .* on meta.*; move them to one"
    with pytest.raises(ValueError, match=message):
        call(name, operands)


@pytest.mark.parametrize("name", OPERATORS)
def test_all_on_meta_and_all_fake_give_shapes(name: str) -> None:
    operands = OPERATORS[name]()
    real = torch.utils._pytree.tree_leaves(call(name, operands))
    on_meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in operands.items()}
    with FakeTensorMode() as mode:
        faked = {
            k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in operands.items()
        }
        of_fakes = call(name, faked)
    for found in (call(name, on_meta), of_fakes):
        for tensor, expected in zip(torch.utils._pytree.tree_leaves(found), real, strict=True):
            assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize(("name", "key"), EACH)
@pytest.mark.parametrize("change", ["longer", "one dimension more"])
def test_an_operand_of_another_shape_is_refused(name: str, key: str, change: str) -> None:
    operands = OPERATORS[name]()
    tensor = operands[key]
    operands[key] = torch.cat([tensor, tensor[:1]]) if change == "longer" else tensor[None]
    with pytest.raises(ValueError, match=f"emergence_kernels::{name}: "):
        call(name, operands)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("expert_mlp", {"activation": "relu"}, "activation is 'relu'"),
        ("expert_mlp", {"activation": "swiglu"}, "w1 is 5 wide, w2 takes 10 of swiglu"),
        (
            "expert_mlp",
            {"w2": randn(E, F, H).float()},
            "w1, b1, w2 and b2 are torch.float32",
        ),
        ("expert_mlp", {"perm": torch.zeros(T * K, dtype=torch.int32)}, "as sort_by_expert makes"),
        ("expert_mlp", {"perm": torch.zeros(2 * T * K, dtype=torch.int64)[::2]}, "as sort_by"),
        ("expert_mlp", {"expert_offsets": torch.zeros(E + 1, dtype=torch.int64)}, "as sort_by"),
        ("expert_mlp", {"weights": randn(T, K + 1)}, "not one of weights' tokens"),
        ("expert_mlp_backward", {"wanted": [True]}, "wanted has 1 flags, not 6"),
        ("route", {"top_k": 0}, "top_k is 0, not from 1 to the 3 experts"),
        ("route", {"top_k": 4}, "top_k is 4"),
        ("route", {"logits": randn(T, E).half()}, "logits are torch.float16"),
    ],
)
def test_what_else_cannot_be_used(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"emergence_kernels::{name}: .*{message}"):
        call(name, OPERATORS[name]() | changes)


@pytest.mark.parametrize(
    ("chosen", "num_experts", "message"),
    [
        (torch.zeros(4, 2, dtype=torch.int32), 2, "topk_experts is torch.int32, not int64"),
        (torch.zeros(4, dtype=torch.int64), 2, r"topk_experts is \(4,\), not \(T, K\)"),
        (torch.zeros(4, 2, dtype=torch.int64), 0, "num_experts is 0"),
    ],
)
def test_what_cannot_be_sorted(chosen: Tensor, num_experts: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"emergence_kernels::sort_by_expert: {message}"):
        sort_by_expert(chosen, num_experts)


def test_the_plain_way_checks_too() -> None:
    given = mlp_operands()
    permutation = emergence_kernels.sort_by_expert(torch.zeros(T, K, dtype=torch.int64), E)
    with pytest.raises(
        ValueError, match=r"emergence_kernels::expert_mlp: w2 is \(3, 4, 5\), not \(E, F, H"
    ):
        emergence_kernels.expert_mlp(
            given["x"], given["weights"], given["w1"], given["b1"],
            given["w2"].transpose(1, 2), given["b2"], permutation, "gelu_tanh",
        )  # fmt: skip

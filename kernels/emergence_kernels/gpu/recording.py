"""What the operators would launch for GPT-2's layer, recorded on tensors without data.

Letters: T tokens, H model width, F expert width, P pre-activation width (F, or 2F for SwiGLU),
E experts, K experts per token, S = T*K routed rows sorted by expert.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations import Activation, pre_activation_width
from ..permutation import Permutation
from . import expert_mlp
from .defaults import Target, candidates, default_plan
from .factors import as_factor
from .gemm_config import PRODUCTS, GemmPlan, Product
from .launch import Launch, recorded_launches
from .permutation import sort_by_expert
from .routing import route_forward
from .routing_gradient import route_backward

T, H, F, E, K = 1024, 768, 3072, 8, 1
S = T * K

BUCKETS = (16, 32, 64, 128, 256, 4096)
"""Rows per expert for which configurations may differ."""

DTYPES = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}
"""Names of a dtype together with the precision of its products."""


@dataclass(frozen=True)
class Case:
    """One way to use the operators."""

    target: Target
    dtype_name: str
    """A key of `DTYPES`."""
    activation: Activation
    bucket: int

    @property
    def dtype(self) -> torch.dtype:
        """Of tokens and weights."""
        return DTYPES[self.dtype_name][0]

    @property
    def precision(self) -> str:
        """Of the products."""
        return DTYPES[self.dtype_name][1]

    @property
    def gated(self) -> bool:
        """Whether the activation multiplies two halves."""
        return self.activation == "swiglu"

    def default_plan(self) -> GemmPlan:
        """The configurations that need no tuning."""
        return default_plan(self.target, self.dtype, self.precision, self.bucket, gated=self.gated)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _permutation() -> Permutation:
    rows_S = _empty(S, dtype=torch.int64)
    return Permutation(rows_S, rows_S, rows_S, _empty(E + 1, dtype=torch.int32))


def _expert_mlp(case: Case, plan: GemmPlan, *, transposed: bool = False) -> None:
    """Forward and backward, with biases unless gated, every gradient wanted.

    Weights are kept in fp32, as under autocast, or in the dtype of the products; with `transposed`
    as views of (E, out, in).
    """
    dtype, has_bias = case.dtype, not case.gated
    pre_width = pre_activation_width(case.activation, F)
    permutation = _permutation()
    x_TH, weights_TK = _empty(T, H, dtype=dtype), _empty(T, K, dtype=torch.float32)
    w1_EHP, w2_EFH = _empty(E, H, pre_width, dtype=dtype), _empty(E, F, H, dtype=dtype)
    if transposed:
        w1_EHP, w2_EFH = (w.mT.contiguous().mT for w in (w1_EHP, w2_EFH))
    b1_EP = _empty(E, pre_width, dtype=dtype) if has_bias else None
    b2_EH = _empty(E, H, dtype=dtype) if has_bias else None
    y_TH, pre_SP = expert_mlp.forward(
        x_TH, weights_TK, w1_EHP, b1_EP, w2_EFH, b2_EH, permutation, case.activation, plan
    )
    for kept in dict.fromkeys((torch.float32, dtype)):
        expert_mlp.backward(
            y_TH, x_TH, weights_TK, w1_EHP, w2_EFH, b2_EH, pre_SP, permutation, case.activation,
            kept, plan, (True, True, True, has_bias, True, has_bias),
        )  # fmt: skip


def _route(case: Case, plan: GemmPlan) -> None:
    """Noisy top-1 and biased top-2, every gradient there is."""
    logits_TE = _empty(T, E, dtype=torch.float32)
    for top_k, noise_TE, bias_E in ((1, logits_TE, None), (2, None, logits_TE[0])):
        probs_TE, noisy_TE, experts_TK, weights_TK, logsumexp_T, _, sums_E, z_sum = route_forward(
            logits_TE, top_k, noise_TE, bias_E
        )
        route_backward(
            probs_TE, noisy_TE, experts_TK, weights_TK, logsumexp_T,
            probs_TE, probs_TE, weights_TK, logsumexp_T, sums_E, z_sum,
        )  # fmt: skip


def _sort(case: Case, plan: GemmPlan) -> None:
    """Few experts in one block of slots, and many over several."""
    sort_by_expert(_empty(T, K, dtype=torch.int64), E)
    sort_by_expert(_empty(T, 8, dtype=torch.int64), 64)


def _round(case: Case, plan: GemmPlan) -> None:
    """Factors of tf32 products."""
    as_factor(_empty(S, H, dtype=torch.float32), "tf32")


LAUNCHERS: tuple[Callable[[Case, GemmPlan], None], ...] = (_expert_mlp, _route, _sort, _round)
"""Every operator with kernels, used once: what is not launched here is not compiled anywhere."""


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def launches(case: Case, plan: GemmPlan) -> list[Launch]:
    """Every kernel that the operators start under `plan`."""
    with _matmul_precision(case.precision), recorded_launches() as recorded:
        for launcher in LAUNCHERS:
            launcher(case, plan)
    return recorded


def transposed_launches(case: Case) -> list[Launch]:
    """Those of the expert MLP under the default plan, for weights stored as (E, out, in)."""
    with _matmul_precision(case.precision), recorded_launches() as recorded:
        _expert_mlp(case, case.default_plan(), transposed=True)
    return recorded


def product_of(launch: Launch) -> Product | None:
    """The product of the expert MLP that a launch computes; None for the kernels without one."""
    if launch.kernel.fn.__name__ == "_row_product_fwd_kernel":
        if not launch.options["TRANSPOSED"]:
            return "down"
        return "activation_grad" if launch.options["O"] == F else "input_grad"
    kernels: dict[str, Product] = {
        "_up_projection_fwd_kernel": "up",
        "_weight_gradient_bwd_kernel": "weight_grad",
    }
    return kernels.get(launch.kernel.fn.__name__)


def candidate_launches(case: Case) -> list[Launch]:
    """The products of `case` under every configuration that tuning may choose for them.

    With a gated activation only the up projection, whose kernel knows about it.
    """
    found = []
    products: tuple[Product, ...] = ("up",) if case.gated else PRODUCTS
    for product in products:
        for config in candidates(
            product,
            case.target,
            case.dtype,
            case.bucket,
            precision=case.precision,
            gated=case.gated,
        ):
            plan = dataclasses.replace(case.default_plan(), **{product: config})
            found += [run for run in launches(case, plan) if product_of(run) == product]
    return found

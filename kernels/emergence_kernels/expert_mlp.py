"""The experts of a whole layer as one differentiable operator over rows sorted by expert.

Letters: T tokens, H model width, F expert width, P pre-activation width (F, or 2F for SwiGLU),
E experts, K experts per token, S = T*K rows sorted by expert.

With r the token and s the weight of a sorted row, A = act(pre), pre = x[r] @ w1[e] + b1[e]:

    y[t] = sum over k of s * (A @ w2[e] + b2[e])

Only x, pre and the routing are kept for backward, and the weights as they are: of another dtype
than x, they are cast forward and again backward, and their gradients have that dtype. The gradient
of s is `<dA', A> + <dy[r], b2[e]>` with dA' = dy[r] @ w2[e].T, so the down projection's output is
never stored (arXiv 2512.14080).

The two registered operators, `expert_mlp` and `expert_mlp_backward`, choose the path by
device and dtype and are opaque to `torch.compile`.
"""

from contextlib import nullcontext
from typing import Any, cast, get_args

import torch
from torch import Tensor

from . import expert_mlp_batched
from .activations import Activation, pre_activation_width
from .batches import BatchPlan
from .gpu.gemm_config import GemmPlan
from .grouped_gemm import empty_gradient
from .operators import define, kernels_take, require, sizes_of
from .permutation import Permutation


def _forward(
    x_TH: Tensor,
    weights_TK: Tensor,
    w1_EHP: Tensor,
    b1_EP: Tensor | None,
    w2_EFH: Tensor,
    b2_EH: Tensor | None,
    perm: Tensor,
    inv_perm: Tensor,
    token_idx: Tensor,
    expert_offsets: Tensor,
    activation: str,
    plan: str,
) -> tuple[Tensor, Tensor]:
    permutation = Permutation(perm, inv_perm, token_idx, expert_offsets)
    act = cast(Activation, activation)
    dtype = x_TH.dtype
    b1_EP, b2_EH = _to(dtype, b1_EP), _to(dtype, b2_EH)
    if kernels_take(x_TH):
        from .gpu import expert_mlp as kernels

        w1_EHP, w2_EFH = w1_EHP.to(dtype), w2_EFH.to(dtype)
        chosen = kernels.plan_for(x_TH, w1_EHP, permutation, act, plan)
        return kernels.forward(
            x_TH, weights_TK, w1_EHP, b1_EP, w2_EFH, b2_EH, permutation, act, chosen
        )
    return expert_mlp_batched.forward(
        x_TH, weights_TK, w1_EHP, b1_EP, w2_EFH, b2_EH, permutation, act, plan
    )


def _to(dtype: torch.dtype, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _fake_forward(
    x_TH: Tensor, weights_TK: Tensor, w1_EHP: Tensor, *others: object
) -> tuple[Tensor, Tensor]:
    num_rows = weights_TK.shape[0] * weights_TK.shape[1]
    return x_TH.new_empty(x_TH.shape), x_TH.new_empty(num_rows, w1_EHP.shape[2])


def _gradients(
    dy_TH: Tensor,
    x_TH: Tensor,
    weights_TK: Tensor,
    w1_EHP: Tensor,
    b1_EP: Tensor | None,
    w2_EFH: Tensor,
    b2_EH: Tensor | None,
    pre_SP: Tensor,
    perm: Tensor,
    inv_perm: Tensor,
    token_idx: Tensor,
    expert_offsets: Tensor,
    activation: str,
    plan: str,
    wanted: list[bool],
) -> list[Tensor]:
    permutation = Permutation(perm, inv_perm, token_idx, expert_offsets)
    act = cast(Activation, activation)
    dtype, kept = x_TH.dtype, w1_EHP.dtype
    b2_EH = _to(dtype, b2_EH)
    if kernels_take(x_TH):
        from .gpu import expert_mlp as kernels

        w1_EHP, w2_EFH = w1_EHP.to(dtype), w2_EFH.to(dtype)
        chosen = kernels.plan_for(x_TH, w1_EHP, permutation, act, plan)
        gradients = kernels.backward(
            dy_TH, x_TH, weights_TK, w1_EHP, w2_EFH, b2_EH, pre_SP, permutation, act, kept,
            chosen, tuple(wanted),
        )  # fmt: skip
    else:
        gradients = expert_mlp_batched.backward(
            dy_TH, x_TH, weights_TK, w1_EHP, w2_EFH, b2_EH, pre_SP, permutation, act,
            tuple(wanted), plan,
        )  # fmt: skip
    return [gradient for gradient in gradients if gradient is not None]


def _fake_gradients(
    dy_TH: Tensor,
    x_TH: Tensor,
    weights_TK: Tensor,
    w1_EHP: Tensor,
    b1_EP: Tensor | None,
    w2_EFH: Tensor,
    b2_EH: Tensor | None,
    pre_SP: Tensor,
    perm: Tensor,
    inv_perm: Tensor,
    token_idx: Tensor,
    expert_offsets: Tensor,
    activation: str,
    plan: str,
    wanted: list[bool],
) -> list[Tensor]:
    inputs = (x_TH, weights_TK, w1_EHP, b1_EP, w2_EFH, b2_EH)
    return [
        empty_gradient(t)
        if t is w1_EHP or t is w2_EFH
        else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, is_wanted in zip(inputs, wanted, strict=True)
        if t is not None and is_wanted
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, ctx.plan = inputs
    _, pre_SP = output
    ctx.mark_non_differentiable(pre_SP)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, pre_SP)


def _backward(ctx: Any, dy_TH: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:6])
    gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if dy_TH is not None and any(wanted):
        *inputs, perm, inv_perm, token_idx, offsets, pre = ctx.saved_tensors
        routing = Permutation(perm, inv_perm, token_idx, offsets)
        if torch.is_grad_enabled():
            made = _differentiable(tuple(inputs), routing, ctx.activation, dy_TH, wanted)
        else:
            made = _expert_mlp_backward(
                dy_TH, *inputs, pre, *routing, ctx.activation, ctx.plan, wanted
            )
        found = iter(made)
        gradients[:6] = [next(found) if is_wanted else None for is_wanted in wanted]
    return tuple(gradients)


def _differentiable(
    inputs: tuple[Any, ...],
    permutation: Permutation,
    activation: Activation,
    dy_TH: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """The wanted gradients as autograd makes them of the plain twin, to be differentiated again."""
    from . import reference

    # views: one input may depend on another, and these are the partial derivatives
    inputs = tuple(None if tensor is None else tensor.view_as(tensor) for tensor in inputs)
    x_TH, weights_TK, w1_EHP, b1_EP, w2_EFH, b2_EH = inputs
    dtype = x_TH.dtype
    y_TH = reference.expert_mlp(
        x_TH,
        weights_TK,
        w1_EHP.to(dtype),
        _to(dtype, b1_EP),
        w2_EFH.to(dtype),
        _to(dtype, b2_EH),
        permutation,
        activation,
    )
    leaves = [tensor for tensor, is_wanted in zip(inputs, wanted, strict=True) if is_wanted]
    return torch.autograd.grad(y_TH, leaves, dy_TH, create_graph=True)


_OPERANDS = (
    ("x", "TH"), ("weights", "TK"), ("w1", "EHP"), ("b1", "EP"), ("w2", "EFH"), ("b2", "EH"),
    ("perm", "S"), ("inv_perm", "S"), ("token_idx", "S"), ("expert_offsets", "O"),
)  # fmt: skip
"""Names and shapes, in the order of the operator; O is E + 1."""


def _check(*arguments: Any) -> None:
    *operands, activation, _ = arguments
    _check_operands("expert_mlp", _OPERANDS, operands, activation)


def _check_gradients(*arguments: Any) -> None:
    *operands, activation, _, wanted = arguments
    name = "expert_mlp_backward"
    specs = (("dy", "TH"), *_OPERANDS[:6], ("pre", "SP"), *_OPERANDS[6:])
    _check_operands(name, specs, operands, activation)
    require(len(wanted) == 6, name, f"wanted has {len(wanted)} flags, not 6")


def _check_operands(
    name: str, specs: tuple[tuple[str, str], ...], operands: list[Any], activation: str
) -> None:
    sizes = sizes_of(name, specs, operands)
    known = activation in get_args(Activation)
    require(known, name, f"activation is {activation!r}, not of {get_args(Activation)}")
    width = pre_activation_width(cast(Activation, activation), sizes["F"])
    require(sizes["P"] == width, name, f"w1 is {sizes['P']} wide, w2 takes {width} of {activation}")
    fits = sizes["S"] == sizes["T"] * sizes["K"] and sizes["O"] == sizes["E"] + 1
    require(fits, name, "the permutation is not one of weights' tokens and w1's experts")
    given = {label: tensor for (label, _), tensor in zip(specs, operands, strict=True)}
    kept = {given[k].dtype for k in ("w1", "b1", "w2", "b2") if given[k] is not None}
    require(len(kept) == 1, name, f"w1, b1, w2 and b2 are {', '.join(sorted(map(str, kept)))}")
    dtypes = [tensor.dtype for tensor in operands[-4:] if tensor.is_contiguous()]
    whole = dtypes == 3 * [torch.int64] + [torch.int32]
    require(whole, name, "the permutation is not as sort_by_expert makes it")


_ROUTING = "Tensor perm, Tensor inv_perm, Tensor token_idx, Tensor expert_offsets"
_WEIGHTS = "Tensor w1, Tensor? b1, Tensor w2, Tensor? b2"
_expert_mlp = define(
    f"expert_mlp(Tensor x, Tensor weights, {_WEIGHTS}, {_ROUTING}, str activation, str plan)"
    " -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _check,
    (_backward, _setup_context),
)
_expert_mlp_backward = define(
    f"expert_mlp_backward(Tensor dy, Tensor x, Tensor weights, {_WEIGHTS}, Tensor pre, {_ROUTING},"
    " str activation, str plan, bool[] wanted) -> Tensor[]",
    _gradients,
    _fake_gradients,
    _check_gradients,
)


def expert_mlp(
    x_TH: Tensor,
    topk_weights_TK: Tensor,
    w1_EHP: Tensor,
    b1_EP: Tensor | None,
    w2_EFH: Tensor,
    b2_EH: Tensor | None,
    permutation: Permutation,
    activation: Activation,
    plan: GemmPlan | BatchPlan | None = None,
) -> Tensor:
    """Weighted sum of every token's K experts: (T, H).

    Args:
        x_TH: (T, H) tokens.
        topk_weights_TK: (T, K) routing weights, at least fp32.
        w1_EHP, b1_EP: up projection (E, H, P) and its bias (E, P) or None.
        w2_EFH, b2_EH: down projection (E, F, H) and its bias (E, H) or None. Either weight may be
            a transposed view of a contiguous tensor; nothing is copied, and its gradient is one.
        permutation: from `sort_by_expert` of the (T, K) chosen experts. Rows from its last offset
            on have no expert: nothing is added for them, and their weights' gradient is zero.
        activation: "gelu_tanh" (P = F) or "swiglu" (P = 2F, gate then up).
        plan: how the kernels are tiled on a GPU, or the experts cut into batches elsewhere; None
            takes the defaults.

    Under autocast everything but the routing weights is computed in the autocast dtype, unless the
    tokens are fp64, as autocast does for a matrix product. The weights are kept for backward as
    they are, and their gradients are in their dtype: on a GPU fp32 sums, never rounded to less.
    Differentiable in every floating input, any number of times; from the second on by the plain
    twin in `reference.py`.

    Raises:
        ValueError: for tokens and weights of different dtypes without autocast.
    """
    autocast = torch.is_autocast_enabled(x_TH.device.type)
    is_cast = autocast and x_TH.dtype != torch.float64
    if is_cast:
        x_TH = x_TH.to(torch.get_autocast_dtype(x_TH.device.type))
    dtypes = {p.dtype for p in (w1_EHP, b1_EP, w2_EFH, b2_EH) if p is not None}
    if len(dtypes) > 1 or not (is_cast or x_TH.dtype in dtypes):
        names = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"tokens are {x_TH.dtype}, expert weights {names}: give them one dtype")
    with torch.autocast(x_TH.device.type, enabled=False) if autocast else nullcontext():
        y_TH: Tensor = _expert_mlp(
            x_TH,
            topk_weights_TK,
            w1_EHP,
            b1_EP,
            w2_EFH,
            b2_EH,
            *permutation,
            activation,
            "" if plan is None else plan.encoded,
        )[0]
    return y_TH

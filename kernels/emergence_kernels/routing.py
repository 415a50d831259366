"""Routing: from router logits to experts, weights, and the sums that the auxiliary losses need.

Letters: T tokens, E experts, K experts per token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .operators import define, require, sizes_of, triton_is_installed


class Routing(NamedTuple):
    """What routing T tokens gives. Everything but `experts_TK` and `expert_counts_E` is
    differentiable in the logits."""

    probs_TE: Tensor
    """Softmax of the logits."""
    noisy_probs_TE: Tensor
    """Softmax of logits and noise: where experts and weights come from."""
    experts_TK: Tensor
    """int64: the best K by noisy probability and bias, best first, lower index first if equal."""
    weights_TK: Tensor
    """K = 1: exactly 1, with the gradient of the chosen noisy probability (straight-through);
    K > 1: the chosen noisy probabilities, divided by their sum."""
    logsumexp_T: Tensor
    """Of the logits."""
    expert_counts_E: Tensor
    """int64: assignments per expert."""
    prob_sums_E: Tensor
    """Sum of `probs_TE` over the tokens."""
    z_sum: Tensor
    """Scalar: sum of `logsumexp_T` squared over the tokens."""


def _on_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype == torch.float32 and triton_is_installed()


def _forward(
    logits_TE: Tensor, top_k: int, noise_TE: Tensor | None, expert_bias_E: Tensor | None
) -> tuple[Tensor, ...]:
    if _on_kernels(logits_TE):
        from .gpu.routing import route_forward

        return route_forward(logits_TE, top_k, noise_TE, expert_bias_E)
    num_experts = logits_TE.shape[1]
    logsumexp_T = logits_TE.logsumexp(dim=-1)
    probs_TE = logits_TE.softmax(dim=-1)
    noisy_TE = probs_TE if noise_TE is None else (logits_TE + noise_TE).softmax(dim=-1)
    scores_TE = noisy_TE if expert_bias_E is None else noisy_TE + expert_bias_E
    if top_k == 1:
        experts_TK = scores_TE.argmax(dim=-1, keepdim=True)
        weights_TK = torch.ones_like(experts_TK, dtype=logits_TE.dtype)
    else:
        order_TE = scores_TE.sort(dim=-1, descending=True, stable=True).indices
        experts_TK = order_TE[:, :top_k].contiguous()
        chosen_TK = noisy_TE.gather(-1, experts_TK)
        weights_TK = chosen_TK / chosen_TK.sum(dim=-1, keepdim=True)
    return (
        probs_TE,
        # an operator may not return one tensor twice
        noisy_TE if noise_TE is not None else logits_TE.new_empty(0, num_experts),
        experts_TK,
        weights_TK,
        logsumexp_T,
        torch.bincount(experts_TK.reshape(-1), minlength=num_experts),
        probs_TE.sum(dim=0),
        logsumexp_T.square().sum(),
    )


def _fake_forward(
    logits_TE: Tensor, top_k: int, noise_TE: Tensor | None, expert_bias_E: Tensor | None
) -> tuple[Tensor, ...]:
    tokens, num_experts = logits_TE.shape
    new = logits_TE.new_empty
    return (
        new(tokens, num_experts),
        new(0 if noise_TE is None else tokens, num_experts),
        new(tokens, top_k, dtype=torch.int64),
        new(tokens, top_k),
        new(tokens),
        new(num_experts, dtype=torch.int64),
        new(num_experts),
        new(()),
    )


def _gradient(probs_TE: Tensor, *operands: Any) -> Tensor:
    """Gradient of the logits from results and gradients, named as in `_plain_gradient`."""
    if _on_kernels(probs_TE):
        from .gpu.routing_gradient import route_backward

        return route_backward(probs_TE, *operands)
    return _plain_gradient(probs_TE, *operands)


def _plain_gradient(
    probs_TE: Tensor,
    noisy_TE: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    logsumexp_T: Tensor,
    dprobs_TE: Tensor | None,
    dnoisy_TE: Tensor | None,
    dweights_TK: Tensor | None,
    dlogsumexp_T: Tensor | None,
    dprob_sums_E: Tensor | None,
    dz_sum: Tensor | None,
) -> Tensor:
    """In plain PyTorch, which autograd can differentiate; `noisy_TE` is empty without noise."""
    has_noise = noisy_TE.shape[0] == probs_TE.shape[0]
    chosen_from_TE = noisy_TE if has_noise else probs_TE
    dlogits_TE = torch.zeros_like(probs_TE)
    if dprobs_TE is not None:
        dlogits_TE += _through_softmax(probs_TE, dprobs_TE)
    if dprob_sums_E is not None:
        dlogits_TE += _through_softmax(probs_TE, dprob_sums_E.expand_as(probs_TE))
    if dnoisy_TE is not None and has_noise:
        dlogits_TE += _through_softmax(noisy_TE, dnoisy_TE)
    if dweights_TK is not None:
        dchosen_TK = dweights_TK
        if weights_TK.shape[1] > 1:
            # of p / sum(p) over the chosen ones
            total_T1 = chosen_from_TE.gather(-1, experts_TK).sum(dim=-1, keepdim=True)
            mean_T1 = (dweights_TK * weights_TK).sum(dim=-1, keepdim=True)
            dchosen_TK = (dweights_TK - mean_T1) / total_T1
        scattered_TE = torch.zeros_like(probs_TE).scatter_(1, experts_TK, dchosen_TK)
        dlogits_TE += _through_softmax(chosen_from_TE, scattered_TE)
    if dlogsumexp_T is not None:
        dlogits_TE += probs_TE * dlogsumexp_T.unsqueeze(1)
    if dz_sum is not None:
        dlogits_TE += probs_TE * (2 * dz_sum * logsumexp_T).unsqueeze(1)
    return dlogits_TE


def _through_softmax(probs_TE: Tensor, grad_TE: Tensor) -> Tensor:
    return probs_TE * (grad_TE - (probs_TE * grad_TE).sum(dim=-1, keepdim=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    probs, noisy, experts, weights, logsumexp, counts, _, _ = output
    ctx.mark_non_differentiable(experts, counts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(probs, noisy, experts, weights, logsumexp)


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    dprobs, dnoisy, _, dweights, dlogsumexp, _, dprob_sums, dz_sum = gradients
    wanted = (dprobs, dnoisy, dweights, dlogsumexp, dprob_sums, dz_sum)
    if all(gradient is None for gradient in wanted):
        return None, None, None, None
    compute: Callable[..., Tensor] = _route_backward
    if torch.is_grad_enabled():  # the gradient is to be differentiated again
        compute = _plain_gradient
    return compute(*ctx.saved_tensors, *wanted), None, None, None


def _check(
    logits_TE: Tensor, top_k: int, noise_TE: Tensor | None, expert_bias_E: Tensor | None
) -> None:
    specs = ("logits", "TE"), ("noise", "TE"), ("expert_bias", "E")
    sizes = sizes_of("route", specs, (logits_TE, noise_TE, expert_bias_E))
    dtype = logits_TE.dtype
    wide = dtype in (torch.float32, torch.float64)
    require(wide, "route", f"logits are {dtype}, not float32 or float64")
    fits = 1 <= top_k <= sizes["E"]
    require(fits, "route", f"top_k is {top_k}, not from 1 to the {sizes['E']} experts")


_BACKWARD_OPERANDS = (
    ("probs", "TE"), ("noisy", "NE"), ("experts", "TK"), ("weights", "TK"), ("logsumexp", "T"),
    ("dprobs", "TE"), ("dnoisy", "NE"), ("dweights", "TK"), ("dlogsumexp", "T"),
    ("dprob_sums", "E"), ("dz_sum", ""),
)  # fmt: skip


def _check_gradient(*operands: Tensor | None) -> None:
    sizes_of("route_backward", _BACKWARD_OPERANDS, operands)


_route = define(
    "route(Tensor logits, int top_k, Tensor? noise, Tensor? expert_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _check,
    (_backward, _setup_context),
)
_route_backward = define(
    "route_backward(Tensor probs, Tensor noisy, Tensor experts, Tensor weights, Tensor logsumexp,"
    " Tensor? dprobs, Tensor? dnoisy, Tensor? dweights, Tensor? dlogsumexp, Tensor? dprob_sums,"
    " Tensor? dz_sum) -> Tensor",
    _gradient,
    lambda probs_TE, *_: torch.empty_like(probs_TE),
    _check_gradient,
)


def route(
    logits_TE: Tensor,
    top_k: int,
    noise_TE: Tensor | None = None,
    expert_bias_E: Tensor | None = None,
) -> Routing:
    """Choose K experts for every token and sum up what the auxiliary losses need, in one pass.

    Args:
        logits_TE: (T, E), fp32 or fp64.
        top_k: K, from 1 to E.
        noise_TE: (T, E) added to the logits for choice and weights only; a constant.
        expert_bias_E: (E,) added to the noisy probabilities for the choice only (loss-free
            balancing, arXiv 2408.15664); a constant.

    The straight-through weight of K = 1 is 1 forward and has the chosen probability's gradient.
    """
    noise_TE = None if noise_TE is None else noise_TE.detach()
    bias_E = None if expert_bias_E is None else expert_bias_E.detach()
    probs_TE, noisy_TE, *others = _route(logits_TE, top_k, noise_TE, bias_E)
    return Routing(probs_TE, probs_TE if noise_TE is None else noisy_TE, *others)

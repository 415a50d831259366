"""Gradient of routing: from all its results to the logits in one pass.

Letters: T tokens, E experts, K experts per token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, next_power_of_2
from .routing import tokens_per_block


@triton.jit
def _through_softmax(probs, grad):
    """Gradient of the logits from that of their softmax."""
    return probs * (grad - tl.sum(probs * grad, 1)[:, None])


@triton.jit
def _route_bwd_kernel(
    probs_ptr,  # (T, E)
    noisy_ptr,  # (T, E), read if HAS_NOISE
    experts_ptr,  # (T, K) int64
    weights_ptr,  # (T, K)
    logsumexp_ptr,  # (T,)
    dprobs_ptr,  # (T, E), read if HAS_DPROBS; like the others contiguous
    dnoisy_ptr,  # (T, E), read if HAS_DNOISY
    dweights_ptr,  # (T, K), read if HAS_DWEIGHTS
    dlogsumexp_ptr,  # (T,), read if HAS_DLSE
    dprob_sums_ptr,  # (E,), read if HAS_DSUMS
    dz_ptr,  # (), read if HAS_DZ
    dlogits_ptr,  # (T, E) out
    num_tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_DPROBS: tl.constexpr,
    HAS_DNOISY: tl.constexpr,
    HAS_DWEIGHTS: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_DSUMS: tl.constexpr,
    HAS_DZ: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid: (blocks of T,)."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, E_PAD)
    real_t = t < num_tokens
    real = real_t[:, None] & (e < E)[None, :]
    places = t[:, None] * E + e[None, :]
    probs = tl.load(probs_ptr + places, mask=real, other=0.0)
    noisy = probs
    if HAS_NOISE:
        noisy = tl.load(noisy_ptr + places, mask=real, other=0.0)
    of_probs = tl.zeros((BLOCK_T, E_PAD), dtype=tl.float32)
    of_noisy = tl.zeros((BLOCK_T, E_PAD), dtype=tl.float32)
    if HAS_DPROBS:
        of_probs += tl.load(dprobs_ptr + places, mask=real, other=0.0)
    if HAS_DSUMS:
        of_probs += tl.load(dprob_sums_ptr + e, mask=e < E, other=0.0)[None, :]
    if HAS_DNOISY:
        of_noisy += tl.load(dnoisy_ptr + places, mask=real, other=0.0)
    if HAS_DWEIGHTS:
        mean = tl.zeros((BLOCK_T,), dtype=tl.float32)
        total = tl.full((BLOCK_T,), 1.0, dtype=tl.float32)
        if K > 1:
            # of p / sum(p) over the chosen ones
            total = tl.zeros((BLOCK_T,), dtype=tl.float32)
            for k in tl.static_range(K):
                expert = tl.load(experts_ptr + t * K + k, mask=real_t, other=0)
                picked = e[None, :] == expert[:, None]
                total += tl.sum(tl.where(picked, noisy, 0.0), 1)
                weight = tl.load(weights_ptr + t * K + k, mask=real_t, other=0.0)
                mean += weight * tl.load(dweights_ptr + t * K + k, mask=real_t, other=0.0)
            total = tl.where(real_t, total, 1.0)
        for k in tl.static_range(K):
            expert = tl.load(experts_ptr + t * K + k, mask=real_t, other=0)
            dweight = tl.load(dweights_ptr + t * K + k, mask=real_t, other=0.0)
            dchosen = (dweight - mean) / total
            of_noisy += tl.where(e[None, :] == expert[:, None], dchosen[:, None], 0.0)
    dlogits = _through_softmax(probs, of_probs) + _through_softmax(noisy, of_noisy)
    if HAS_DLSE:
        dlse = tl.load(dlogsumexp_ptr + t, mask=real_t, other=0.0)
        dlogits += probs * dlse[:, None]
    if HAS_DZ:
        logsumexp = tl.load(logsumexp_ptr + t, mask=real_t, other=0.0)
        dlogits += probs * (2.0 * tl.load(dz_ptr) * logsumexp)[:, None]
    tl.store(dlogits_ptr + places, dlogits, mask=real)


def route_backward(
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
    """Gradient (T, E) of the logits from those of the results of `route_forward`."""
    tokens, num_experts = probs_TE.shape
    has_noise = noisy_TE.shape[0] == tokens
    e_pad = next_power_of_2(num_experts)
    block_t = tokens_per_block(num_experts)
    dlogits_TE = torch.empty_like(probs_TE)
    gradients = (dprobs_TE, dnoisy_TE, dweights_TK, dlogsumexp_T, dprob_sums_E, dz_sum)
    launch(
        _route_bwd_kernel,
        (cdiv(tokens, block_t),),
        probs_TE,
        noisy_TE,
        experts_TK,
        weights_TK,
        logsumexp_T,
        *(None if gradient is None else gradient.contiguous() for gradient in gradients),
        dlogits_TE,
        tokens,
        E=num_experts,
        K=experts_TK.shape[1],
        HAS_NOISE=has_noise,
        HAS_DPROBS=dprobs_TE is not None,
        HAS_DNOISY=has_noise and dnoisy_TE is not None,
        HAS_DWEIGHTS=dweights_TK is not None,
        HAS_DLSE=dlogsumexp_T is not None,
        HAS_DSUMS=dprob_sums_E is not None,
        HAS_DZ=dz_sum is not None,
        E_PAD=e_pad,
        BLOCK_T=block_t,
        num_warps=4,
    )
    return dlogits_TE

"""Routing in one pass over the logits, and its gradient in another.

Letters: T tokens, E experts, K experts per token, B blocks of tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emergence_kernels.gpu.launch import launch

_BLOCK_ELEMENTS = 4096
"""Size of a block (tokens, E): several such blocks stay in registers."""


@triton.jit
def _route_fwd_kernel(
    logits_ptr,  # (T, E) contiguous
    noise_ptr,  # (T, E) contiguous, read if HAS_NOISE
    bias_ptr,  # (E,), read if HAS_BIAS
    probs_ptr,  # (T, E) out
    noisy_ptr,  # (T, E) out, written if HAS_NOISE
    experts_ptr,  # (T, K) int64 out
    weights_ptr,  # (T, K) out
    logsumexp_ptr,  # (T,) out
    block_counts_ptr,  # (B, E) int32 out: assignments
    block_sums_ptr,  # (B, E) out: sums of the probabilities
    block_z_ptr,  # (B,) out: sums of the squared logsumexps
    num_tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    E_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid: (B,)."""
    block = tl.program_id(0).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, E_PAD)
    k = tl.arange(0, K_PAD)
    real = (t < num_tokens)[:, None] & (e < E)[None, :]
    places = t[:, None] * E + e[None, :]
    logits = tl.load(logits_ptr + places, mask=real, other=float("-inf"))
    # a token past the end has one logit, so that nothing of it is infinite
    logits = tl.where((t >= num_tokens)[:, None] & (e == 0)[None, :], 0.0, logits)
    largest = tl.max(logits, 1)
    powers = tl.exp(logits - largest[:, None])
    total = tl.sum(powers, 1)
    probs = powers / total[:, None]
    logsumexp = largest + tl.log(total)
    tl.store(probs_ptr + places, probs, mask=real)
    tl.store(logsumexp_ptr + t, logsumexp, mask=t < num_tokens)
    noisy = probs
    if HAS_NOISE:
        shifted = logits + tl.load(noise_ptr + places, mask=real, other=0.0)
        powers = tl.exp(shifted - tl.max(shifted, 1)[:, None])
        noisy = powers / tl.sum(powers, 1)[:, None]
        tl.store(noisy_ptr + places, noisy, mask=real)
    scores = tl.where((e < E)[None, :], noisy, float("-inf"))
    if HAS_BIAS:
        scores += tl.load(bias_ptr + e, mask=e < E, other=0.0)[None, :]
    experts = tl.zeros((BLOCK_T, K_PAD), dtype=tl.int32)
    chosen = tl.zeros((BLOCK_T, K_PAD), dtype=tl.float32)
    assigned = tl.zeros((BLOCK_T, E_PAD), dtype=tl.int32)
    for slot in tl.static_range(K):
        best = tl.max(scores, 1)
        first = tl.min(tl.where(scores == best[:, None], e[None, :], E_PAD), 1)
        # not-a-number equals nothing: any expert rather than one that does not exist
        expert = tl.minimum(first, E - 1)
        picked = e[None, :] == expert[:, None]
        prob = tl.sum(tl.where(picked, noisy, 0.0), 1)
        experts = tl.where((k == slot)[None, :], expert[:, None], experts)
        chosen = tl.where((k == slot)[None, :], prob[:, None], chosen)
        assigned += picked.to(tl.int32)
        scores = tl.where(picked, float("-inf"), scores)
    weights = (
        chosen / tl.sum(chosen, 1)[:, None] if K > 1 else tl.full(chosen.shape, 1.0, tl.float32)
    )
    slots = t[:, None] * K + k[None, :]
    kept = (t < num_tokens)[:, None] & (k < K)[None, :]
    tl.store(experts_ptr + slots, experts.to(tl.int64), mask=kept)
    tl.store(weights_ptr + slots, weights, mask=kept)
    sums_of_block = block * E + e
    counts = tl.sum(tl.where(real, assigned, 0), 0)
    tl.store(block_counts_ptr + sums_of_block, counts, mask=e < E)
    tl.store(block_sums_ptr + sums_of_block, tl.sum(tl.where(real, probs, 0.0), 0), mask=e < E)
    squared = tl.where(t < num_tokens, logsumexp * logsumexp, 0.0)
    tl.store(block_z_ptr + block, tl.sum(squared, 0))


@triton.jit
def _add_blocks_fwd_kernel(
    block_counts_ptr,  # (B, E) int32
    block_sums_ptr,  # (B, E)
    block_z_ptr,  # (B,)
    counts_ptr,  # (E,) int64 out
    sums_ptr,  # (E,) out
    z_ptr,  # () out
    num_blocks,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCKS_AT_ONCE: tl.constexpr,
):
    """Grid: (1,); adds in one order, so that two runs agree to the bit."""
    e = tl.arange(0, E_PAD)
    counts = tl.zeros((E_PAD,), dtype=tl.int64)
    sums = tl.zeros((E_PAD,), dtype=tl.float32)
    z = tl.zeros((BLOCKS_AT_ONCE,), dtype=tl.float32)
    for first in range(0, num_blocks, BLOCKS_AT_ONCE):
        block = first + tl.arange(0, BLOCKS_AT_ONCE)
        real = (block < num_blocks)[:, None] & (e < E)[None, :]
        places = block.to(tl.int64)[:, None] * E + e[None, :]
        counts += tl.sum(tl.load(block_counts_ptr + places, mask=real, other=0).to(tl.int64), 0)
        sums += tl.sum(tl.load(block_sums_ptr + places, mask=real, other=0.0), 0)
        z += tl.load(block_z_ptr + block, mask=block < num_blocks, other=0.0)
    tl.store(counts_ptr + e, counts, mask=e < E)
    tl.store(sums_ptr + e, sums, mask=e < E)
    tl.store(z_ptr, tl.sum(z, 0))


def route_forward(
    logits_TE: Tensor, top_k: int, noise_TE: Tensor | None, expert_bias_E: Tensor | None
) -> tuple[Tensor, ...]:
    """The tensors of `emergence_kernels.routing.Routing`, the noisy ones empty without noise.

    All inputs are fp32; a logit row may be in any layout.
    """
    tokens, num_experts = logits_TE.shape
    e_pad, k_pad = triton.next_power_of_2(num_experts), triton.next_power_of_2(top_k)
    block_t = max(min(128, _BLOCK_ELEMENTS // e_pad), 1)
    num_blocks = triton.cdiv(tokens, block_t)
    new = logits_TE.new_empty
    probs_TE, noisy_TE = new(tokens, num_experts), new(0, num_experts)
    if noise_TE is not None:
        noisy_TE = new(tokens, num_experts)
    experts_TK = new(tokens, top_k, dtype=torch.int64)
    weights_TK, logsumexp_T = new(tokens, top_k), new(tokens)
    counts_BE = new(num_blocks, num_experts, dtype=torch.int32)
    sums_BE, z_B = new(num_blocks, num_experts), new(num_blocks)
    launch(
        _route_fwd_kernel,
        (num_blocks,),
        logits_TE.contiguous(),
        None if noise_TE is None else noise_TE.float().contiguous(),
        None if expert_bias_E is None else expert_bias_E.float().contiguous(),
        probs_TE,
        noisy_TE,
        experts_TK,
        weights_TK,
        logsumexp_T,
        counts_BE,
        sums_BE,
        z_B,
        tokens,
        E=num_experts,
        K=top_k,
        HAS_NOISE=noise_TE is not None,
        HAS_BIAS=expert_bias_E is not None,
        E_PAD=e_pad,
        K_PAD=k_pad,
        BLOCK_T=block_t,
        num_warps=4,
    )
    counts_E, sums_E = new(num_experts, dtype=torch.int64), new(num_experts)
    z_sum = new(())
    launch(
        _add_blocks_fwd_kernel,
        (1,),
        counts_BE,
        sums_BE,
        z_B,
        counts_E,
        sums_E,
        z_sum,
        num_blocks,
        E=num_experts,
        E_PAD=e_pad,
        BLOCKS_AT_ONCE=max(min(64, _BLOCK_ELEMENTS // e_pad), 1),
        num_warps=4,
    )
    return probs_TE, noisy_TE, experts_TK, weights_TK, logsumexp_T, counts_E, sums_E, z_sum


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
    e_pad = triton.next_power_of_2(num_experts)
    block_t = max(min(128, _BLOCK_ELEMENTS // e_pad), 1)
    dlogits_TE = torch.empty_like(probs_TE)
    gradients = (dprobs_TE, dnoisy_TE, dweights_TK, dlogsumexp_T, dprob_sums_E, dz_sum)
    launch(
        _route_bwd_kernel,
        (triton.cdiv(tokens, block_t),),
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

"""Routing in one pass over the logits.

Letters: T tokens, E experts, K experts per token, B blocks of tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, next_power_of_2

_BLOCK_ELEMENTS = 4096
"""Size of a block (tokens, E): several such blocks stay in registers."""


def tokens_per_block(num_experts: int) -> int:
    """Tokens that one program takes."""
    return max(min(128, _BLOCK_ELEMENTS // next_power_of_2(num_experts)), 1)


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
    e_pad, k_pad = next_power_of_2(num_experts), next_power_of_2(top_k)
    block_t = tokens_per_block(num_experts)
    num_blocks = cdiv(tokens, block_t)
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

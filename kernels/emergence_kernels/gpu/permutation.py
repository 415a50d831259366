"""Counting sort of routed rows by expert: stable, deterministic, without host synchronisation.

Letters: T tokens, K experts per token, S = T*K slots t*K + k, E experts, B blocks of slots.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, next_power_of_2

_ONE_HOT_ELEMENTS = 8_192
"""Size of a one-hot matrix (slots, E) that stays in registers."""
_MOST_BLOCKS = 256
"""Every block adds up the counts of all blocks, so that their number must not grow with S."""


@triton.jit
def _one_hot(experts_ptr, piece, num_slots, E_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """Slots (BLOCK,) of a piece, and which expert each has: (BLOCK, E_PAD) int32."""
    slot = tl.cast(piece, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts_ptr + slot, mask=slot < num_slots, other=-1)
    return slot, (expert[:, None] == tl.arange(0, E_PAD)[None, :]).to(tl.int32)


@triton.jit
def _count_fwd_kernel(
    experts_ptr,  # (S,) int64: the expert of every slot
    counts_ptr,  # (B, E) int32 out: slots of every expert in every block
    num_slots,
    pieces,  # of BLOCK slots that each block of slots has
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (B,)."""
    e = tl.arange(0, E_PAD)
    count_E = tl.zeros((E_PAD,), dtype=tl.int32)
    for piece in range(tl.program_id(0) * pieces, tl.program_id(0) * pieces + pieces):
        count_E += tl.sum(_one_hot(experts_ptr, piece, num_slots, E_PAD, BLOCK)[1], 0)
    tl.store(counts_ptr + tl.program_id(0) * E + e, count_E, mask=e < E)


@triton.jit
def _place_fwd_kernel(
    experts_ptr,  # (S,) int64: the expert of every slot
    counts_ptr,  # (B, E) int32: slots of every expert in every block, read if there are several
    perm_ptr,  # (S,) int64 out: sorted row -> slot
    inv_perm_ptr,  # (S,) int64 out: slot -> sorted row
    token_idx_ptr,  # (S,) int64 out: sorted row -> token
    expert_offsets_ptr,  # (E+1,) int32 out: first sorted row of every expert
    num_slots,
    num_blocks,
    pieces,  # of BLOCK slots that each block of slots has
    E: tl.constexpr,
    K: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_AT_ONCE: tl.constexpr,
):
    """Grid: (B,); each block adds up the counts of all blocks for itself."""
    e = tl.arange(0, E_PAD)
    this = tl.program_id(0)
    before_E = tl.zeros((E_PAD,), dtype=tl.int32)
    total_E = tl.zeros((E_PAD,), dtype=tl.int32)
    if ONE_BLOCK:
        total_E = tl.sum(_one_hot(experts_ptr, this, num_slots, E_PAD, BLOCK)[1], 0)
    else:
        for first in range(0, num_blocks, BLOCKS_AT_ONCE):
            block = first + tl.arange(0, BLOCKS_AT_ONCE)
            inside = (block < num_blocks)[:, None] & (e < E)[None, :]
            counts = tl.load(counts_ptr + block[:, None] * E + e[None, :], mask=inside, other=0)
            total_E += tl.sum(counts, 0)
            before_E += tl.sum(tl.where((block < this)[:, None], counts, 0), 0)
    start_E = tl.cumsum(total_E, 0) - total_E
    next_E = start_E + before_E
    for piece in range(this * pieces, this * pieces + pieces):
        slot, one_hot = _one_hot(experts_ptr, piece, num_slots, E_PAD, BLOCK)
        rank = tl.cumsum(one_hot, 0) - one_hot
        row = tl.sum(one_hot * (rank + next_E[None, :]), 1).to(tl.int64)
        tl.store(perm_ptr + row, slot, mask=slot < num_slots)
        tl.store(inv_perm_ptr + slot, row, mask=slot < num_slots)
        tl.store(token_idx_ptr + row, slot // K, mask=slot < num_slots)
        next_E += tl.sum(one_hot, 0)
    if this == 0:
        tl.store(expert_offsets_ptr + e, start_E, mask=e < E)
        tl.store(expert_offsets_ptr + E, num_slots)


def sort_by_expert(topk_experts_TK: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    """The four tensors of `emergence_kernels.permutation.Permutation`.

    `topk_experts_TK` (T, K) is int64 and contiguous, with values in [0, num_experts).
    """
    num_slots = topk_experts_TK.numel()
    e_pad = next_power_of_2(num_experts)
    block = max(min(1024, _ONE_HOT_ELEMENTS // e_pad), 16)
    pieces = max(cdiv(num_slots, block * _MOST_BLOCKS), 1)
    num_blocks = max(cdiv(num_slots, block * pieces), 1)
    new = topk_experts_TK.new_empty
    perm_S, inv_perm_S, token_idx_S = new(num_slots), new(num_slots), new(num_slots)
    expert_offsets = new(num_experts + 1, dtype=torch.int32)
    counts_BE = None
    if num_blocks > 1:
        counts_BE = new(num_blocks, num_experts, dtype=torch.int32)
        launch(
            _count_fwd_kernel,
            (num_blocks,),
            topk_experts_TK,
            counts_BE,
            num_slots,
            pieces,
            E=num_experts,
            E_PAD=e_pad,
            BLOCK=block,
            num_warps=8,
        )
    launch(
        _place_fwd_kernel,
        (num_blocks,),
        topk_experts_TK,
        counts_BE,
        perm_S,
        inv_perm_S,
        token_idx_S,
        expert_offsets,
        num_slots,
        num_blocks,
        pieces,
        E=num_experts,
        K=topk_experts_TK.shape[1],
        ONE_BLOCK=num_blocks == 1,
        E_PAD=e_pad,
        BLOCK=block,
        BLOCKS_AT_ONCE=max(min(64, _ONE_HOT_ELEMENTS // e_pad), 1),
        num_warps=8,
    )
    return perm_S, inv_perm_S, token_idx_S, expert_offsets

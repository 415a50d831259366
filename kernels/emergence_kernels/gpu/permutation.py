"""Counting sort of routed rows by expert: stable, deterministic, without host synchronisation.

Letters: T tokens, K experts per token, S = T*K slots t*K + k, E experts, B blocks of slots.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emergence_kernels.gpu.launch import cdiv, launch, next_power_of_2

_ONE_HOT_ELEMENTS = 8_192
"""Size of a block's one-hot matrix (slots, E) that stays in registers."""


@triton.jit
def _count_fwd_kernel(
    experts_ptr,  # (S,) int64: the expert of every slot
    counts_ptr,  # (B, E) int32 out: slots of every expert in every block
    num_slots,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (B,)."""
    e = tl.arange(0, E_PAD)
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts_ptr + slot, mask=slot < num_slots, other=-1)
    one_hot = (expert[:, None] == e[None, :]).to(tl.int32)
    counts_ptrs = counts_ptr + tl.program_id(0).to(tl.int64) * E + e
    tl.store(counts_ptrs, tl.sum(one_hot, 0), mask=e < E)


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
    slot = this.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts_ptr + slot, mask=slot < num_slots, other=-1)
    one_hot = (expert[:, None] == e[None, :]).to(tl.int32)
    before_E = tl.zeros((E_PAD,), dtype=tl.int32)
    total_E = tl.zeros((E_PAD,), dtype=tl.int32)
    if ONE_BLOCK:
        total_E = tl.sum(one_hot, 0)
    else:
        for first in range(0, num_blocks, BLOCKS_AT_ONCE):
            block = first + tl.arange(0, BLOCKS_AT_ONCE)
            inside = (block < num_blocks)[:, None] & (e < E)[None, :]
            counts_ptrs = counts_ptr + block.to(tl.int64)[:, None] * E + e[None, :]
            counts = tl.load(counts_ptrs, mask=inside, other=0)
            total_E += tl.sum(counts, 0)
            before_E += tl.sum(tl.where((block < this)[:, None], counts, 0), 0)
    start_E = tl.cumsum(total_E, 0) - total_E
    rank = tl.cumsum(one_hot, 0) - one_hot
    row = tl.sum(one_hot * (rank + (start_E + before_E)[None, :]), 1).to(tl.int64)
    tl.store(perm_ptr + row, slot, mask=slot < num_slots)
    tl.store(inv_perm_ptr + slot, row, mask=slot < num_slots)
    tl.store(token_idx_ptr + row, slot // K, mask=slot < num_slots)
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
    num_blocks = max(cdiv(num_slots, block), 1)
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
        E=num_experts,
        K=topk_experts_TK.shape[1],
        ONE_BLOCK=num_blocks == 1,
        E_PAD=e_pad,
        BLOCK=block,
        BLOCKS_AT_ONCE=max(min(64, _ONE_HOT_ELEMENTS // e_pad), 1),
        num_warps=8,
    )
    return perm_S, inv_perm_S, token_idx_S, expert_offsets

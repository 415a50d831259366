"""Weights, and rows that are not gathered, loaded as whole tiles through tensor descriptors.

From sm_90 on the tensor memory accelerator copies such a tile with one instruction; elements
outside the tensor arrive as zeros. Descriptors are made on the host and passed by value, so that a
CUDA graph keeps them and no workspace is needed.

Letters: E experts, I and O the weight's two widths.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from emergence_kernels.gpu.gemm_config import GemmConfig


def can_describe(config: GemmConfig, *tensors: Tensor) -> bool:
    """Whether `config` asks for descriptors and the tensors (contiguous) and their device can
    have them: sm_90 or later, and 16-byte aligned rows."""
    if not config.tma:
        return False
    device = tensors[0].device
    has_hopper = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
    if torch.version.hip or not has_hopper:
        return False
    aligned = [t.data_ptr() % 16 == 0 and t.shape[-1] * t.itemsize % 16 == 0 for t in tensors]
    return all(aligned) and all(tensor.numel() for tensor in tensors)


def describe_weight(w: Tensor, config: GemmConfig, *, transposed: bool = False) -> TensorDescriptor:
    """For `multiply_described`: tiles of `w` (E, I, O), or (E, O, I) if `transposed`."""
    tile = [config.block_n, config.block_k] if transposed else [config.block_k, config.block_n]
    return TensorDescriptor.from_tensor(w, [1, *tile])


def describe_rows(rows: Tensor, config: GemmConfig) -> TensorDescriptor:
    """For `multiply_described`: tiles of sorted rows (S, I)."""
    return TensorDescriptor.from_tensor(rows, [config.block_m, config.block_k])


@triton.jit
def multiply_described(
    a,  # descriptor of the left factor (S, K), or a pointer to it if GATHERED
    row_offsets,  # (BLOCK_M,) int64: where each row starts, used if GATHERED
    first_row,  # of the tile, used if not GATHERED
    w,  # descriptor of (E, K, columns), or of (E, columns, K) if TRANSPOSED
    expert,
    first_column,
    K: tl.constexpr,
    GATHERED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) fp32, as `multiply_rows`; rows and columns outside may be anything."""
    expert = expert.to(tl.int32)
    k = tl.arange(0, BLOCK_K)
    accumulator = tl.zeros((row_offsets.shape[0], BLOCK_N), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K, warp_specialize=SPECIALIZE):
        if not GATHERED:
            left = a.load([first_row, start])
        elif K % BLOCK_K == 0:
            left = tl.load(a + row_offsets[:, None] + (start + k)[None, :])
        else:
            inside = k[None, :] < K - start
            left = tl.load(a + row_offsets[:, None] + (start + k)[None, :], mask=inside, other=0.0)
        if TRANSPOSED:
            w_tile = w.load([expert, first_column, start]).reshape(BLOCK_N, BLOCK_K).T
        else:
            w_tile = w.load([expert, start, first_column]).reshape(BLOCK_K, BLOCK_N)
        accumulator = tl.dot(left, w_tile, accumulator, input_precision=PRECISION)
    return accumulator

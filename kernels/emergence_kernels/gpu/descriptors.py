"""Weights and sorted rows loaded as whole tiles through tensor descriptors.

From sm_90 on the tensor memory accelerator copies such a tile with one instruction; elements
outside the tensor arrive as zeros. Descriptors are made on the host and passed by value, so that a
CUDA graph keeps them and no workspace is needed.

Letters: E experts, I and O the weight's two widths, S routed rows sorted by expert.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .gemm_config import GemmConfig


@cache
def _has_accelerator(device: torch.device) -> bool:
    if device.type != "cuda":  # the interpreter and compilations for absent devices
        return not torch.version.hip
    return not torch.version.hip and torch.cuda.get_device_capability(device)[0] >= 9


def can_describe(config: GemmConfig, *tensors: Tensor) -> bool:
    """Whether `config` asks for descriptors and the tensors (contiguous) and their device can
    have them: sm_90 or later, and 16-byte aligned rows."""
    if not config.tma:
        return False
    if not _has_accelerator(tensors[0].device):
        return False
    aligned = [t.data_ptr() % 16 == 0 and t.shape[-1] * t.itemsize % 16 == 0 for t in tensors]
    return all(aligned) and all(tensor.numel() for tensor in tensors)


def describe(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles of `rows` by `columns` of sorted rows (S, I), or of one expert's part of a weight."""
    return TensorDescriptor.from_tensor(tensor, [1] * (tensor.ndim - 2) + [rows, columns])


def describe_factors(
    x_SI: Tensor, w: Tensor, config: GemmConfig, *, transposed: bool = False
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """For `multiply_described`: of sorted rows (S, I), and of `w` (E, I, O), or (E, O, I) if
    `transposed`."""
    tile = (config.block_n, config.block_k) if transposed else (config.block_k, config.block_n)
    return describe(x_SI, config.block_m, config.block_k), describe(w, *tile)


@triton.jit
def multiply_described(
    x,  # descriptor of the left factor (S, K)
    first_row,  # of the tile
    w,  # descriptor of (E, K, columns), or of (E, columns, K) if TRANSPOSED
    expert,
    first_column,
    K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) fp32, as `multiply_rows`; rows and columns outside may be anything."""
    expert = expert.to(tl.int32)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K, warp_specialize=SPECIALIZE):
        left = x.load([first_row, start])
        if TRANSPOSED:
            w_tile = w.load([expert, first_column, start]).reshape(BLOCK_N, BLOCK_K).T
        else:
            w_tile = w.load([expert, start, first_column]).reshape(BLOCK_K, BLOCK_N)
        accumulator = tl.dot(left, w_tile, accumulator, input_precision=PRECISION)
    return accumulator

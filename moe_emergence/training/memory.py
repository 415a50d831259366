"""Memory: freed pages stay with the process, and what to change where there is not enough."""

import ctypes
import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_emergence.errors import RunError

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of mallopt(3), from glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep what is freed, for the whole process; whether it did.

    By default glibc asks the kernel for every large array and returns it when freed, and the kernel
    clears each page again: most of what writing a gradient costs. The price is that memory once
    used is the process's until it ends. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
    if not kept:
        logger.info("mallopt refused: steps will pay for fresh memory")
    return kept


@contextmanager
def explained() -> Iterator[None]:
    """Turn what is raised within for want of memory into a `RunError` that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        lacking = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        # what PyTorch's allocator for the CPU says is a plain RuntimeError
        if not lacking and "DefaultCPUAllocator" not in str(error):
            raise
        raise RunError(
            "out of memory; lower --batch-size and raise --grad-accum-steps, lower --block-size, "
            "or give a smaller model or fewer --num-experts. What was saved before is untouched"
        ) from error

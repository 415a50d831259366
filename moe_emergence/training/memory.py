"""Freed memory stays with the process, so that a step does not pay for fresh pages again."""

import ctypes
import logging
import platform

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

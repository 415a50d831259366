"""Processes that start with their imports done."""

import multiprocessing
import sys
from multiprocessing.context import ForkServerContext, SpawnContext


def warm_processes(*modules: str) -> ForkServerContext | SpawnContext:
    """A multiprocessing context whose processes begin with `modules` imported.

    On Linux they are forked from a server that imported them once and has started neither threads
    nor CUDA: a process takes milliseconds where importing torch and transformers takes seconds.
    Elsewhere forking is not safe, and each imports anew. A module that the server cannot import is
    left to the processes; one that asks for a GPU as it is imported must not be named.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*modules])
    return context

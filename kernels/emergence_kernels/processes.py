"""Processes that start with their imports done."""

import multiprocessing
import sys
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path

_PACKAGE = __name__.partition(".")[0]
IMPORT_PACKAGE = f"""
import importlib.util, sys
if {_PACKAGE!r} not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        {_PACKAGE!r}, {str(Path(__file__).with_name("__init__.py"))!r}
    )
    sys.modules[{_PACKAGE!r}] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[{_PACKAGE!r}])
"""
"""Source that imports this package in another process, under the name that it has in this one: the
kernel hub's loader makes one up, and no path leads to it."""


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

"""Commands in processes of their own that start with their imports done, which are most of a start.

That entry points start in an interpreter of their own is tested in test_packaging.py.
"""

import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

import torch

from emergence_kernels.processes import warm_processes

IMPORTS = (
    *("moe_emergence.train.work", "moe_emergence.analyze.work", "moe_emergence.experiments.worker"),
    *("benchmarks.workers", "benchmarks.gpu.stages", "datasets"),
)


def share_one_server() -> None:
    """A process has one fork server, which imports what its first user names: here, all of it."""
    own = forkserver.set_forkserver_preload
    forkserver.set_forkserver_preload = lambda names: own([*IMPORTS, *names])


class WarmCommand:
    """`python -m MODULE FLAGS...`, with `subprocess.Popen`'s methods as far as they are needed."""

    def __init__(self, arguments: Sequence[str], where: Path, stdout: Path, stderr: Path) -> None:
        option, module, *flags = arguments
        assert option == "-m", "only modules start warm"
        context = warm_processes(*IMPORTS)
        self._process = context.Process(
            target=_run, args=(module, flags, where, stdout, stderr, {**alone(), "COLUMNS": "200"})
        )
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()


def run_warm(
    *arguments: str, where: Path, logs: Path, timeout: float = 300
) -> "subprocess.CompletedProcess[str]":
    """`python -m MODULE FLAGS...` in the folder `where`; its output lies in the folder `logs`."""
    paths = logs / "stdout.txt", logs / "stderr.txt"
    command = WarmCommand(arguments, where, *paths)
    code = command.wait(timeout)
    if code is None:
        command.terminate()
        raise subprocess.TimeoutExpired(arguments, timeout)
    return subprocess.CompletedProcess(arguments, code, *(p.read_text("utf-8") for p in paths))


def alone() -> dict[str, str]:
    """The environment without what makes a pytest started in it take itself for a worker."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}


def _run(
    module: str,
    flags: list[str],
    where: Path,
    stdout: Path,
    stderr: Path,
    environment: dict[str, str],
) -> None:
    os.chdir(where)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [module, *flags]
    sys.modules.pop(module, None)  # it runs as the main module, anew
    runpy.run_module(module, run_name="__main__", alter_sys=True)

"""A disk that fails at a chosen call, whoever makes it: Python, or a library in C, C++ or Rust.

`Disk` compiles `disk_shim.c`, keeps a warm process with it preloaded, and forks commands there.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CHANGES, READS = 1, 2
NOT_MOUNTED = 77
ONCE, FROM_THEN_ON, SHORT = 0, 1, 2
"""The n-th call fails; it and all that follow; a write takes half of its bytes."""


@dataclass(frozen=True)
class Fault:
    """Call number `n` below the folder fails; 0 for none, with the calls written down."""

    n: int = 0
    error: int = errno.ENOSPC
    how: int = ONCE
    kinds: int = CHANGES

    def __str__(self) -> str:
        way = {ONCE: "", FROM_THEN_ON: " from then on", SHORT: " (short)"}[self.how]
        return f"call {self.n}: {errno.errorcode[self.error]}{way}"


@dataclass(frozen=True)
class Call:
    """A call as the shim saw it."""

    name: str
    path: Path
    to: Path | None = None
    """Of a rename."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str
    calls: list[Call]


class Disk:
    """Commands on a disk that fails. A context manager, as it keeps a process."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.shim = scratch / "disk_shim.so"
        compiler = find_compiler()
        assert compiler, "no C compiler"
        flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wno-unused-function", "-o", str(self.shim)]
        subprocess.run([compiler, *flags, str(HERE / "disk_shim.c"), "-ldl"], check=True)

    def __enter__(self) -> "Disk":
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "LD_PRELOAD": str(self.shim),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
        self._server = subprocess.Popen(
            [sys.executable, str(HERE / "disk_server.py"), str(self.shim)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert self._answer() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()  # type: ignore[union-attr]
        self._server.wait()

    def run(self, argv: list[str], below: Path, fault: Fault | None = None, size: int = 0) -> Ended:
        """`python -m ARGV...`, with the fault on files below the folder `below`.

        With a `size` that folder is a file system of its own, of so many bytes; the exit code is
        `NOT_MOUNTED` where that may not be.
        """
        fault = fault or Fault()
        trace = self.scratch / "trace.txt"
        trace.unlink(missing_ok=True)
        out, err = self.scratch / "stdout.txt", self.scratch / "stderr.txt"
        task = {
            "argv": argv,
            "where": str(self.scratch),
            "stdout": str(out),
            "stderr": str(err),
            "bytes": size,
            "fault": {**vars(fault), "below": str(below), "trace": str(trace)},
        }
        self._server.stdin.write(json.dumps(task) + "\n")  # type: ignore[union-attr]
        self._server.stdin.flush()  # type: ignore[union-attr]
        code = int(self._answer())
        texts = (path.read_text("utf-8", errors="replace") for path in (out, err))
        return Ended(code, *texts, read_trace(trace))

    def _answer(self) -> str:
        line = self._server.stdout.readline().strip()  # type: ignore[union-attr]
        assert line, "the warm process ended"
        return line


def read_trace(path: Path) -> list[Call]:
    if not path.exists():
        return []
    calls = []
    for line in path.read_text("utf-8").splitlines():
        _, name, one, other = line.split("\t")
        calls.append(Call(name, Path(one), Path(other) if other else None))
    return calls


def find_compiler() -> str | None:
    """The system's C compiler where this works (Linux), else None."""
    if sys.platform != "linux":
        return None
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)

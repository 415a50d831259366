"""The project's own tests and certificate on a GPU, with their logs kept."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.program import REPOSITORY, Fields, Setting

TESTS = ("tests/test_gpu_*.py", "tests/test_moe_dispatch.py", "tests/test_kernels_*.py")
TINY_TESTS = ("tests/test_moe_noise.py",)
"""No kernels: the interpreter of an older Triton warns, and a warning fails a test."""


def tests(setting: Setting) -> Iterator[Fields]:
    """Run the tests of layer and kernels; the row has pytest's last lines."""
    patterns = TINY_TESTS if setting.tiny else TESTS
    files = [str(p) for pattern in patterns for p in sorted(REPOSITORY.glob(pattern))]
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "--no-header",
               "-p", "no:cacheprovider", "-p", "no:benchmark", "-n", str(setting.workers),
               "--dist", "worksteal", *files]  # fmt: skip
    yield kept_output(command, "tests.log", setting)


def certificate(setting: Setting) -> Iterator[Fields]:
    """`verify` in bf16 and fp32."""
    dtypes = ("fp32",) if setting.tiny else ("bf16", "fp32")
    for dtype in dtypes:
        name = f"certificate-{dtype}"
        out = str(Path(setting.out) / f"{name}.json")
        command = [sys.executable, "-m", "moe_emergence.verify", "--device", setting.device,
                   "--dtype", dtype, "--json", out]  # fmt: skip
        yield kept_output(command, f"{name}.log", setting)


def kept_output(command: list[str], log: str, setting: Setting) -> Fields:
    """Run `command` until the deadline, its output at the end of the file `log`; how it ended."""
    path = Path(setting.out) / log
    before = path.stat().st_size if path.exists() else 0
    started = time.time()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path[1:]),
        "PYTHONUNBUFFERED": "1",
    }
    with path.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=environment
        )
        code: int | str
        try:
            code = process.wait(max(setting.deadline - time.time() - 10, 1))
        except subprocess.TimeoutExpired:
            code = "out of time"
            process.send_signal(signal.SIGINT)  # pytest then says what failed so far
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    with path.open(encoding="utf-8", errors="replace") as file:
        file.seek(before)
        lines = file.read().splitlines()
    return {
        # where a machine keeps its files is nobody's business
        "command": " ".join(command[1:]).replace(str(setting.out), Path(setting.out).name)[:200],
        "exit": code,
        "seconds": round(time.time() - started, 1),
        "last_lines": lines[-25:],
    }

"""The project's own tests and certificate on a GPU, with their logs kept."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.program import Fields, Setting

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = ("tests/test_gpu_layer.py", "tests/test_moe_dispatch.py", "tests/test_kernels_*.py")
TINY_TESTS = ("tests/test_kernels_routing.py",)


def tests(setting: Setting) -> Iterator[Fields]:
    """Run the tests of layer and kernels; the row has pytest's last lines."""
    patterns = TINY_TESTS if setting.tiny else TESTS
    files = [str(p) for pattern in patterns for p in sorted(REPOSITORY.glob(pattern))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=40",
               "-n", str(setting.workers), "--dist", "worksteal", "--no-header",
               *files]  # fmt: skip
    yield _kept(command, "tests.log", setting)


def certificate(setting: Setting) -> Iterator[Fields]:
    """`verify` in bf16 and fp32."""
    dtypes = ("fp32",) if setting.tiny else ("bf16", "fp32")
    for dtype in dtypes:
        name = f"certificate-{dtype}"
        out = str(Path(setting.out) / f"{name}.json")
        command = [sys.executable, "-m", "moe_emergence.verify", "--device", setting.device,
                   "--dtype", dtype, "--json", out]  # fmt: skip
        yield _kept(command, f"{name}.log", setting)


def _kept(command: list[str], log: str, setting: Setting) -> Fields:
    """Run `command` until the deadline with its output in the file `log`; how it ended."""
    path = Path(setting.out) / log
    started = time.time()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path[1:]),
        "PYTHONUNBUFFERED": "1",
    }
    with path.open("w", encoding="utf-8") as file:
        try:
            code: int | str = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=environment,
                timeout=max(setting.deadline - time.time() - 3, 1), check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = "timed out"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return {
        "command": " ".join(command[1:])[:200],
        "exit": code,
        "seconds": round(time.time() - started, 1),
        "last_lines": lines[-12:],
    }

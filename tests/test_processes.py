"""Processes that start with their imports done, and may still use CUDA."""

import sys

import pytest
from conftest import REPOSITORY, Command

pytestmark = pytest.mark.slow

STARTS_WARM = """
from emergence_kernels.processes import warm_processes

look = "import sys; sys.exit(0 if 'colorsys' in sys.modules else 3)"
process = warm_processes("colorsys").Process(target=exec, args=(look,))
process.start()
process.join()
raise SystemExit(process.exitcode)
"""

# a process that has asked for a GPU, if only whether there is one, leaves its forks without
LEAVES_CUDA_ALONE = """
import importlib
import torch

touched = []
for name in ("is_available", "device_count", "_lazy_init"):
    setattr(torch.cuda, name, lambda *_, name=name: touched.append(name))
modules = ["benchmarks.workers", "benchmarks.steps", "moe_emergence.certificate.certify"]
if importlib.util.find_spec("triton"):
    modules.append("emergence_kernels.gpu.compiling")
for name in modules:
    importlib.import_module(name)
assert not touched, touched
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every process imports anew")
def test_a_process_starts_with_its_imports_done(command: Command) -> None:
    done = command("-c", STARTS_WARM)
    assert done.returncode == 0, done.stderr


def test_what_is_imported_beforehand_leaves_cuda_alone(command: Command) -> None:
    done = command("-c", LEAVES_CUDA_ALONE, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr

"""Starting a kernel: compiled once for everything that it depends on, then started directly."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import compile_process

pytest.importorskip("triton", reason="kernels are started by Triton, which is not installed")

pytestmark = pytest.mark.slow

WITH_A_DRIVER_THAT_RECORDS = '''
import json
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

STARTS = []

class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}
    def load_binary(self, name, kernel, shared, device, *others):
        return 1, 2, 32, 0, 1024

class Absent:
    """An sm_90 that notes what it is asked to start."""
    utils = Utils()
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 7
    def launcher_cls(self, source, metadata):
        def run(x, y, z, stream, function, *others):
            arguments = others[-len(source.fn.arg_names):]
            shown = [a if isinstance(a, (int, bool, type(None))) else "tensor" for a in arguments]
            STARTS.append([source.hash(), [x, y, z], stream, shown])
        return run

driver.set_active(Absent())
from emergence_kernels.gpu import launch as launching
from emergence_kernels.gpu.combine import combine, gather

through_triton = []
original = triton.runtime.JITFunction.run
def counted(self, *args, **kwargs):
    through_triton.append(self.fn.__name__)
    return original(self, *args, **kwargs)
triton.runtime.JITFunction.run = counted

x, rows = torch.zeros(64, 32), torch.zeros(48, dtype=torch.int64)
odd = torch.zeros(64 * 32 + 1)[1:].view(64, 32)
combine(x, torch.zeros(64, dtype=torch.int64), 2, torch.zeros(32, 2))
for operand, count in ((x, 48), (x, 48), (x, 32), (x, 7), (x, 1), (odd, 48), (x.half(), 48),
                       (x, 0)):
    gather(operand, rows[:count])
combine(x, torch.zeros(64, dtype=torch.int64), 2, torch.zeros(32, 2))
cached = len(through_triton), list(STARTS)

STARTS.clear()
launching._compiled.clear()
for operand, count in ((x, 48), (x, 48), (x, 32), (x, 7), (x, 1), (odd, 48), (x.half(), 48)):
    launching._compiled.clear()
    gather(operand, rows[:count])
print(json.dumps({"through_triton": cached[0], "starts": cached[1], "fresh": STARTS}))
'''


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("launch")
    done = compile_process(folder, "-c", WITH_A_DRIVER_THAT_RECORDS)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_what_was_compiled_is_started_without_triton(found: dict[str, Any]) -> None:
    """One combine; gathers of 16-byte rows with 48, 7 and 1 rows, unaligned, and in fp16."""
    assert found["through_triton"] == 6


def test_an_empty_grid_starts_nothing(found: dict[str, Any]) -> None:
    assert len(found["starts"]) == 9


def test_a_direct_start_is_tritons_own(found: dict[str, Any]) -> None:
    """Kernel, grid, stream and every argument, constants included."""
    assert found["starts"][1:-1] == found["fresh"]
    assert found["starts"][0] == found["starts"][-1]
    assert found["starts"][0][2] == 7

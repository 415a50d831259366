"""`pytest --benchmark-only`: whole optimizer steps, dense, mixture and the predecessor's loop.

`BENCH_SIZE=large` also runs GPT-2 small on a CPU (minutes, 12 GB of memory).
"""

from typing import Any

import pytest
import torch

from benchmarks.command import BUDGET_S, SIZE
from benchmarks.results import Record
from benchmarks.setups import SETUPS, Setup
from benchmarks.steps import Bench
from benchmarks.training_step import measure_training

pytest_plugins = ["benchmarks.fixtures"]

HAS_GPU = torch.cuda.is_available()
if SIZE == "tiny":
    NAMES = ["tiny"]
elif HAS_GPU:
    NAMES = ["gpt2-small", "gpt2-small-batch16", "gpt2-small-top2"]
else:
    NAMES = ["demo", "gpt2-small"] if SIZE == "large" else ["demo"]


@pytest.mark.parametrize("precision", ["bf16", "fp32"] if HAS_GPU and SIZE != "tiny" else ["fp32"])
@pytest.mark.parametrize("setup", [SETUPS[n] for n in NAMES], ids=lambda setup: setup.name)
def test_training(
    setup: Setup, precision: str, device: str, record: Record, benchmark: Any
) -> None:
    """Every model in turns; pytest-benchmark's own figure is a step with `auto`."""
    record(measure_training(setup, device, precision, budget_s=2 * BUDGET_S))
    bench = Bench(setup, device, precision, "mixture")
    benchmark.group = f"training {setup.name} {precision}"

    def once() -> None:
        bench.step("auto")
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=3, warmup_rounds=1)

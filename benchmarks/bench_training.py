"""`pytest --benchmark-only`: whole optimizer steps, dense, mixture and the predecessor's loop.

`BENCH_SIZE=large` also runs GPT-2 small on a CPU (minutes, 12 GB of memory).
"""

from typing import Any

import pytest
import torch

from benchmarks.command import BUDGET_S, SIZE
from benchmarks.results import Record, Row
from benchmarks.setups import SETUPS, Setup
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
    """Every model in turns."""

    def measure() -> list[Row]:
        return measure_training(setup, device, precision, budget_s=2 * BUDGET_S)

    record(benchmark.pedantic(measure, rounds=1))

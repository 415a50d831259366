"""Whole optimizer steps on a GPU."""

from collections.abc import Iterator
from dataclasses import asdict

from benchmarks.gpu.program import Fields, Setting
from benchmarks.setups import SETUPS
from benchmarks.training_step import GRAPHED, measure_training

MODELS = ("dense", "fused", "grouped", "sequential")


def steps(setting: Setting) -> Iterator[Fields]:
    """Rows of the training suite: GPT-2 small in bf16, dense and by dispatcher."""
    names = ("tiny",) if setting.tiny else ("gpt2-small-batch16", "gpt2-small")
    precision = "bf16" if setting.device == "cuda" else "fp32"
    for name in names:
        rows = measure_training(
            SETUPS[name], setting.device, precision, budget_s=0.1 if setting.tiny else 4.0,
            models=(*MODELS, *GRAPHED) if setting.device == "cuda" else MODELS,
        )  # fmt: skip
        for row in rows:
            yield {k: v for k, v in asdict(row).items() if v is not None and k != "parameters"}

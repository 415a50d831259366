"""What the benchmark commands share: flags, device and logging."""

import argparse
import logging
import os
import sys
from typing import Any

import torch

from benchmarks.results import describe_environment
from benchmarks.workloads import DTYPES

SIZE = os.environ.get("BENCH_SIZE", "default")
"""What `pytest --benchmark-only` runs: default, tiny (toys, for tests) or large (adds GPT-2 small
on a CPU: minutes, 12 GB of memory)."""
BUDGET_S = 0.05 if SIZE == "tiny" else 3.0
"""Seconds of timing for each group under pytest."""


def add_common(parser: argparse.ArgumentParser) -> None:
    """Flags that every measuring command has."""
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), help="only these")
    parser.add_argument(
        "--time-limit", type=float, default=600.0, help="seconds; no group is begun after that"
    )
    parser.add_argument(
        "--budget", type=float, default=2.0, help="seconds of timing for each group"
    )
    parser.add_argument("--tiny", action="store_true", help="toy sizes, which measure nothing")


def device_of(flag: str) -> str:
    """The device ("cuda" or "cpu") for `--device`; exits with one line if it is not there."""
    if flag == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if flag == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    return flag


def common_environment(device: str) -> dict[str, Any]:
    """The record that goes with the rows; makes products of fp32 exact fp32 on CUDA."""
    torch.backends.cuda.matmul.allow_tf32 = False
    return describe_environment(device)


def start_logging() -> None:
    """Progress on stderr."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )

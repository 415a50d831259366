"""Runs that should be the same, to the bit or up to rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_emergence.run_folder import RunFolder, read_metrics


def comparable(path: Path) -> list[dict[str, Any]]:
    """Metric rows without the timings."""
    rows = read_metrics(path)
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def assert_same_run(one: RunFolder, other: RunFolder) -> None:
    assert comparable(one.metrics) == comparable(other.metrics)
    for folder in ("final-model", "best-model"):
        a = load_file(one.root / folder / "model.safetensors")
        b = load_file(other.root / folder / "model.safetensors")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), folder
    states = [
        torch.load(run.checkpoint(6) / "trainer.pt", weights_only=True) for run in (one, other)
    ]
    for p, q in zip(*(s["optimizer"]["state"].values() for s in states), strict=True):
        assert torch.equal(p["exp_avg"], q["exp_avg"])
        assert torch.equal(p["exp_avg_sq"], q["exp_avg_sq"])


def assert_equal_runs(one: RunFolder, other: RunFolder) -> None:
    """Equal up to the rounding of sums taken in another order."""
    rows, other_rows = (comparable(run.metrics) for run in (one, other))
    assert [row["step"] for row in rows] == [row["step"] for row in other_rows]
    for row, other_row in zip(rows, other_rows, strict=True):
        assert row.keys() == other_row.keys()
        for key, value in row.items():
            assert other_row[key] == pytest.approx(value, rel=2e-5, abs=1e-7), (row["step"], key)
    weights, other_weights = (load_file(r.final_model / "model.safetensors") for r in (one, other))
    assert weights.keys() == other_weights.keys()
    for name, tensor in weights.items():
        # a step moves a weight by at most the learning rate; equal runs differ by much less
        torch.testing.assert_close(other_weights[name], tensor, rtol=0, atol=2e-5)

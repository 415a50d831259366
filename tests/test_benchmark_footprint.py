"""Measuring what a pass keeps must not itself keep anything."""

import runpy
import sys
import weakref

import pytest
import torch
from conftest import REPOSITORY
from torch import Tensor

from benchmarks.footprint import resident_peak, saved_bytes


def test_the_graph_is_gone_once_its_tensors_were_counted() -> None:
    """An exponential saves its own output; kept alive, a graph spoils later CUDA captures."""
    x = torch.randn(8, requires_grad=True)
    kept: list[weakref.ref[Tensor]] = []

    def run() -> Tensor:
        y = x.exp()
        kept.append(weakref.ref(y))
        return y * 1

    assert saved_bytes(run, [x]) == 8 * 4
    assert kept[0]() is None


def test_the_peak_of_the_process_is_left_out_where_python_does_not_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on Windows, which has no module `resource`."""
    peak = resident_peak()
    assert peak is not None
    assert 10**7 < peak < 10**12
    monkeypatch.setitem(sys.modules, "resource", None)
    assert resident_peak() is None
    # every suite is collected through this module
    workers = runpy.run_path(str(REPOSITORY / "benchmarks" / "workers.py"))
    assert workers["_answer"](None, "peak", "", "cpu") is None

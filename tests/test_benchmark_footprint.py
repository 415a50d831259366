"""Measuring what a pass keeps must not itself keep anything."""

import weakref

import torch
from torch import Tensor

from benchmarks.footprint import saved_bytes


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

"""Real CUDA graphs of the optimizer step; without a GPU see test_training_graph.py."""

from typing import Any

import pytest
import torch
from test_training_graph import STEPS, make, train

from moe_emergence.cuda_graph import CudaCapture, NotCapturableError
from moe_emergence.training.graph import GraphedUpdate
from moe_emergence.training.schedules import Rates
from moe_emergence.training.update import Outcome

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_a_replayed_step_is_bitwise_an_eager_one(kind: str, dropout: float, precision: str) -> None:
    model, update = make(kind, "global", dropout, device="cuda", precision=precision)

    def plainly(*inputs: Any) -> Outcome:
        return update(
            *inputs[:2], Rates(*(torch.tensor(rate, device="cuda") for rate in inputs[2]))
        )

    expected = train(model, plainly, kind, range(STEPS))
    other, replayed = make(kind, "global", dropout, device="cuda", precision=precision)
    graphed = GraphedUpdate(replayed, required=True, capture=CudaCapture(torch.device("cuda")))
    assert train(other, graphed, kind, range(STEPS)) == expected
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_waits_for_the_host_is_heard_before() -> None:
    capture = CudaCapture(torch.device("cuda"))
    x = torch.ones(3, device="cuda")
    assert capture.rehearse(lambda: x * 2)[1] is None
    found, reason = capture.rehearse(lambda: float(x.sum()))
    assert found == 3.0
    assert reason is not None
    assert "test_gpu_graph.py" in reason


def test_a_capture_that_fails_leaves_everything_usable() -> None:
    capture = CudaCapture(torch.device("cuda"))
    x = torch.ones(3, device="cuda")
    with pytest.raises(NotCapturableError):
        capture.record(lambda: float((x + torch.rand_like(x)).sum()))
    torch.manual_seed(3)
    assert torch.rand(4, device="cuda").isfinite().all()
    replay = capture.record(lambda: torch.rand_like(x) + x)
    torch.manual_seed(3)
    first = replay().clone()
    torch.manual_seed(3)
    assert torch.equal(replay(), first)
    assert not torch.equal(replay(), first)

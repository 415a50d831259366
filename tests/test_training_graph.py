"""The optimizer step as a graph: replayed, it computes what the same step does launch by launch.

Without a GPU a recording of the step's operators takes the graph's place (cpu_graph.py).
"""

import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from cpu_graph import RecordedOnCpu
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from moe_emergence.config import OptimConfig, RunConfig
from moe_emergence.cuda_graph import NotCapturableError
from moe_emergence.data.loader import StepBatch
from moe_emergence.errors import RunError
from moe_emergence.models import upcycle
from moe_emergence.moe import RouterNoise
from moe_emergence.training.experiment import run_experiment
from moe_emergence.training.graph import (
    WARM_UP,
    GraphedUpdate,
    check_can_capture,
    dispatch_of,
    make_update,
)
from moe_emergence.training.objective import NextTokenLoss
from moe_emergence.training.schedules import Rates, build_optimizer, noise_std
from moe_emergence.training.update import Outcome, Update

STEPS = 12
OPTIM = OptimConfig(
    max_steps=STEPS, learning_rate=1e-2, warmup_fraction=0.2, noise_std=0.5,
    noise_anneal_fraction=0.7, lb_coef=0.3, router_learning_rate_scale=0.3, freeze_router_after=9,
)  # fmt: skip

RATES = Rates(1e-2, 1e-2)


def make(
    kind: str = "moe",
    scope: str = "global",
    dropout: float = 0.0,
    device: str = "cpu",
    precision: str = "no",
) -> tuple[PreTrainedModel, Update]:
    """The same model and optimizer every time."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=precision)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config)
    if kind != "dense":
        model = upcycle(model, [0, 1], 4, 2, noise=0.5, use_expert_bias=True)
    model.train()
    optim = replace(OPTIM, balance_scope=scope)
    model.to(device)
    loss, optimizer = accelerator.prepare(NextTokenLoss(model), build_optimizer(model, optim))
    return model, Update(accelerator, loss, optimizer, optim, 0.05)


def batch(step: int) -> StepBatch:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 50, (2, 4, 12), generator=generator)
    return StepBatch(ids, torch.eye(3).double()[torch.randint(0, 3, (2, 4), generator=generator)])


def train(
    model: PreTrainedModel, update: Callable[..., Outcome], kind: str, steps: range
) -> list[list[float]]:
    rows = []
    for step in steps:
        torch.manual_seed(hash((7, step)))
        noise = None if kind == "dense" else RouterNoise(noise_std(step, OPTIM), 3, step)
        on_device = StepBatch(*(t.to(model.device) for t in batch(step)))
        sums, norm = update(on_device, noise, Rates.at(step, OPTIM))
        rows.append([float(norm), *torch.cat([t.flatten() for t in vars(sums).values()]).tolist()])
    return rows


@pytest.mark.parametrize(
    ("kind", "scope", "dropout"),
    [
        ("moe", "global", 0.0),
        ("moe", "micro", 0.0),
        ("moe", "global", 0.2),
        ("dense", "global", 0.0),
        ("dense", "global", 0.2),
    ],
)
def test_replayed_steps_are_bitwise_those_launched_one_by_one(
    kind: str, scope: str, dropout: float
) -> None:
    model, update = make(kind, scope, dropout)

    def plainly(*inputs: Any) -> Outcome:
        return update(*inputs[:2], Rates(*map(torch.tensor, inputs[2])))

    expected = train(model, plainly, kind, range(STEPS))
    other, replayed = make(kind, scope, dropout)
    capture = RecordedOnCpu()
    graphed = GraphedUpdate(replayed, required=True, capture=capture)
    assert train(other, graphed, kind, range(STEPS)) == expected
    states = model.state_dict(), other.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
    # the router's noise ends after 8 steps, which is another graph
    graphs = 2 if kind == "moe" else 1
    counted = (capture.rehearsals, capture.records, capture.replays)
    assert counted == (WARM_UP, graphs, STEPS - WARM_UP)


def test_outcomes_of_earlier_steps_stay() -> None:
    _, update = make()
    graphed = GraphedUpdate(update, required=True, capture=RecordedOnCpu())
    kept = [graphed(batch(s), RouterNoise(0.5, 3, s), RATES) for s in range(WARM_UP + 3)]
    losses = [float(outcome.sums.lm_loss) for outcome in kept]
    assert len(set(losses)) == len(losses)
    assert len({float(outcome.grad_norm) for outcome in kept}) == len(kept)


def test_the_optimizer_is_left_as_any_other() -> None:
    """A checkpoint of a graphed run goes on without graphs."""
    model, update = make()
    graphed = GraphedUpdate(update, required=True, capture=RecordedOnCpu())
    train(model, graphed, "moe", range(6))
    state = deepcopy(update.optimizer.state_dict())
    assert not any(group["capturable"] for group in state["param_groups"])
    other, plain = make()
    other.load_state_dict(model.state_dict())
    plain.optimizer.load_state_dict(state)
    rows = train(other, plain, "moe", range(6, STEPS))
    for row, expected in zip(rows, train(model, graphed, "moe", range(6, STEPS)), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)  # the rate is fp32 in a graph


class Refusing(RecordedOnCpu):
    """Cannot capture, or hears at the rehearsal that it should not try."""

    def __init__(self, *, at_rehearsal: bool) -> None:
        super().__init__()
        self.at_rehearsal = at_rehearsal

    def rehearse(self, work: Callable[[], Outcome]) -> tuple[Outcome, str | None]:
        return work(), "it waits at layer.py:3" if self.at_rehearsal else None

    def record(self, work: Callable[[], Outcome]) -> Callable[[], Outcome]:
        assert not self.at_rehearsal
        raise NotCapturableError("operation not permitted")


@pytest.mark.parametrize("at_rehearsal", [True, False])
def test_where_there_is_no_graph_training_goes_on_or_says_why(
    at_rehearsal: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, update = make()
    graphed = GraphedUpdate(update, required=False, capture=Refusing(at_rehearsal=at_rehearsal))
    with caplog.at_level(logging.WARNING):
        rows = train(model, graphed, "moe", range(STEPS))
    reason = "layer.py:3" if at_rehearsal else "not permitted"
    assert caplog.text.count(reason) == 1
    other, plain = make()
    for row, expected in zip(rows, train(other, plain, "moe", range(STEPS)), strict=True):
        assert row == pytest.approx(expected, rel=1e-3)

    _, update = make()
    strict = GraphedUpdate(update, required=True, capture=Refusing(at_rehearsal=at_rehearsal))
    with pytest.raises(RunError, match=rf"--cuda-graph on: .*{reason}"):
        train(model, strict, "moe", range(STEPS))


def test_a_step_that_asks_for_a_value_cannot_be_recorded() -> None:
    """The stand-in notices what a graph could not hold: this test's own test."""
    model, update = make()

    def asks(*inputs: Any) -> Outcome:
        outcome = Update.__call__(update, *inputs)
        float(outcome.grad_norm)
        return outcome

    before = [p.clone() for p in model.parameters()]
    with pytest.raises(NotCapturableError, match="value of a tensor"):
        RecordedOnCpu().record(lambda: asks(batch(0), RouterNoise(0.0, 3, 0), RATES))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_graphs_are_refused_where_there_are_none(tiny_config: RunConfig) -> None:
    _, update = make()
    asked = replace(tiny_config, cuda_graph="on")
    with pytest.raises(ValueError, match=r"--cuda-graph on: there are none on a cpu; give auto"):
        check_can_capture(asked, update.accelerator)
    with pytest.raises(ValueError, match="--cuda-graph on"):
        run_experiment(replace(asked, device="cpu"))
    assert make_update(update, replace(asked, cuda_graph="auto")) is update
    on_a_gpu: Any = type("Accelerator", (), {"device": torch.device("cuda"), "num_processes": 1})
    waiting = replace(asked, dispatch="sequential")
    with pytest.raises(ValueError, match="--dispatch sequential waits for the routing"):
        check_can_capture(waiting, on_a_gpu)
    check_can_capture(asked, on_a_gpu)
    asked = replace(asked, dispatch="auto")
    assert dispatch_of(asked, on_a_gpu) == "fused"
    assert dispatch_of(replace(asked, cuda_graph="off"), on_a_gpu) == "auto"
    assert dispatch_of(replace(asked, dispatch="grouped"), on_a_gpu) == "grouped"
    assert dispatch_of(replace(asked, cuda_graph="auto"), update.accelerator) == "auto"
    on_a_gpu.num_processes = 2
    with pytest.raises(ValueError, match="single process"):
        check_can_capture(asked, on_a_gpu)


def test_the_loss_makes_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers would ask the device whether the positions are packed, in every step."""
    model, update = make("dense")
    asked = []
    monkeypatch.setattr(
        "transformers.masking_utils.find_packed_sequence_indices",
        lambda position_ids: asked.append(position_ids),
    )
    update(batch(0), None, Rates(0.0, 0.0))
    assert not asked
    assert model.config._attn_implementation == "sdpa"
    model(input_ids=batch(0).input_ids[0], use_cache=False)
    assert asked

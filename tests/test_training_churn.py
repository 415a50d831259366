"""Routing churn, against a loop over the tokens."""

import logging
from typing import Any

import pytest
import torch
from small_models import VOCAB, make_model
from torch import Tensor

from moe_emergence.config import SHIPPED
from moe_emergence.models import MoEGPT2LMHeadModel
from moe_emergence.training.churn import HIGH, ROWS, ChurnProbe
from moe_emergence.training.objective import NextTokenLoss

CPU = torch.device("cpu")


def text(rows: int = ROWS + 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {d: torch.randint(0, VOCAB, (rows, 12), generator=generator).int() for d in SHIPPED}


def shake(model: MoEGPT2LMHeadModel, layer: int) -> None:
    generator = torch.Generator().manual_seed(layer)
    weight: Any = model.moe_layers()[layer].router.weight
    with torch.no_grad():
        weight += weight.std() * torch.randn(weight.shape, generator=generator)


def first_experts(model: MoEGPT2LMHeadModel, layer: int) -> list[int]:
    found: list[int] = []
    place = list(model.moe_layers()).index(layer)
    for blocks in text().values():
        for block in blocks[:ROWS]:
            decision = model(input_ids=block[None].long()).router_decisions[place]
            found += [int(row.argmax()) for row in decision.router_logits]
    return found


@torch.no_grad()
def test_churn_is_the_share_of_tokens_with_another_first_expert() -> None:
    model = make_model().eval()
    probe, loss = ChurnProbe(text(), (1, 3)), NextTokenLoss(model).train()
    assert probe.check(loss, CPU, 0, 100) == {}
    assert probe.check(loss, CPU, 10, 100) == {"eval/layer_1_churn": 0, "eval/layer_3_churn": 0}
    assert loss.training
    model.eval()
    before = first_experts(model, 3)
    shake(model, 3)
    changed = sum(a != b for a, b in zip(before, first_experts(model, 3), strict=True))
    found = probe.check(loss, CPU, 20, 100)
    assert found["eval/layer_1_churn"] == 0
    assert found["eval/layer_3_churn"] == pytest.approx(changed / len(before))
    assert changed > 0


def test_a_probe_goes_on_from_its_state() -> None:
    model = make_model()
    one, other = (ChurnProbe(text(), (1, 3)) for _ in range(2))
    loss = NextTokenLoss(model)
    one.check(loss, CPU, 5, 100)
    other.load_state_dict(one.state_dict())
    shake(model, 1)
    assert one.check(loss, CPU, 6, 100) == other.check(loss, CPU, 6, 100) != {}


def test_a_dense_model_has_none_and_a_hash_router_no_change() -> None:
    assert ChurnProbe(text(), ()).check(NextTokenLoss(make_model()), CPU, 0, 9) == {}
    loss = NextTokenLoss(make_model(router="hash"))
    probe = ChurnProbe(text(), (1, 3))
    probe.check(loss, CPU, 0, 9)
    assert set(probe.check(loss, CPU, 1, 9).values()) == {0.0}


def test_much_churn_late_in_training_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    loss, probe = NextTokenLoss(model), ChurnProbe(text(), (1, 3))
    weight: Any = model.moe_layers()[3].router.weight
    probe.check(loss, CPU, 0, 100)
    for step in (50, 60):
        weight.data.neg_()
        with caplog.at_level(logging.WARNING):
            found = probe.check(loss, CPU, step, 100)
        assert found["eval/layer_3_churn"] > HIGH
        if step == 50:
            assert not caplog.records
    assert len(caplog.records) == 1
    assert "step 60" in caplog.text
    assert "layer 3 than at step 50" in caplog.text
    assert "--router-learning-rate-scale" in caplog.text

"""What pulls at a router, against gradients taken by backward passes of their own."""

import copy
import itertools
import math
from collections.abc import Callable

import llama_models
import pytest
import small_models
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_emergence.analysis.router_gradients import router_gradients
from moe_emergence.moe import auxiliary_losses, routing_variance

MODELS = {
    "top1": lambda: small_models.make_model(1),
    "top2": lambda: small_models.make_model(2),
    "llama": lambda: llama_models.make_mixture("llama"),
}


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def gradients(model: PreTrainedModel, ids: Tensor, loss: str) -> dict[int, Tensor]:
    """Of one loss alone, with its coefficient, in fp64."""
    model = copy.deepcopy(model).double()
    out = model(input_ids=ids, labels=ids)
    lb_loss, z_loss = auxiliary_losses(out.router_decisions)
    terms = {
        "lm": out.lm_loss,
        "lb": model.config.lb_coef * lb_loss,
        "z": model.config.z_coef * z_loss,
        "variance": -model.config.variance_coef * routing_variance(out.router_decisions),
    }
    terms[loss].backward()
    return {i: layer.router.weight.grad.flatten() for i, layer in model.moe_layers().items()}


@pytest.mark.parametrize("losses", [("lm", "lb", "z"), ("lm", "lb", "z", "variance")])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_norms_and_cosines_are_those_of_separate_backward_passes(
    make: Callable[[], PreTrainedModel], losses: tuple[str, ...]
) -> None:
    model = make().train()
    model.config.lb_coef, model.config.z_coef = 0.3, 0.05
    model.config.variance_coef = 0.7 if "variance" in losses else 0.0
    ids = small_models.ids(8)
    rows = router_gradients(model, ids)
    assert [row["layer"] for row in rows] == [1, 3]
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    of = {
        (loss, half): gradients(model, ids[4 * half : 4 * half + 4], loss)
        for loss in losses
        for half in (0, 1)
    }
    for row in rows:
        own = {key: found[row["layer"]] for key, found in of.items()}
        mean = {loss: (own[loss, 0] + own[loss, 1]) / 2 for loss in losses}
        for loss, gradient in mean.items():
            assert row[f"norm_{loss}"] == pytest.approx(gradient.norm().item(), rel=1e-3)
            expected = cosine(own[loss, 0], own[loss, 1])
            assert row[f"agreement_{loss}"] == pytest.approx(expected, abs=1e-3)
        assert len(row) == 1 + 2 * len(losses) + math.comb(len(losses), 2)
        for one, other in itertools.combinations(losses, 2):
            expected = cosine(mean[one], mean[other])
            assert row[f"cosine_{one}_{other}"] == pytest.approx(expected, abs=1e-3)


def test_two_halves_alike_agree_and_a_switched_off_loss_is_nothing() -> None:
    model = small_models.make_model(1)
    model.config.lb_coef = 0.0
    half = small_models.ids(3)
    for row in router_gradients(model, torch.cat([half, half])):
        assert row["agreement_lm"] == pytest.approx(1)
        assert row["agreement_z"] == pytest.approx(1)
        assert row["norm_lb"] == row["agreement_lb"] == row["cosine_lm_lb"] == 0


@pytest.mark.parametrize("router", ["frozen", "hash"])
def test_a_router_that_is_not_trained_has_none(router: str) -> None:
    dense = small_models.make_dense()
    model = small_models.upcycle(dense, [1, 3], 4, router=router)
    assert router_gradients(model, small_models.ids(4)) == []
    assert router_gradients(dense, small_models.ids(4)) == []

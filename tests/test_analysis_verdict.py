"""The report's verdict on models that learned nothing, and on models told the domain."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_models import FAMILIES, tiny_mixture
from torch import Tensor

from moe_emergence.analysis.information import largest_of_layers
from moe_emergence.analysis.information_table import Resampling, information_table
from moe_emergence.analysis.report.summary import summarise
from moe_emergence.analysis.routers import RouterReader
from moe_emergence.analysis.routing_tables import routing_summary
from moe_emergence.analysis.streaming import count_routing
from moe_emergence.config import SHIPPED

MORE = "experts follow domains more than random routers do"
BLOCKS, LENGTH, VOCAB = 24, 32, 300


def text(seed: int) -> dict[str, Tensor]:
    """Domains that use a common vocabulary with other frequencies."""
    rng = np.random.default_rng(seed)
    shares = [rng.dirichlet(np.full(VOCAB, 0.1)) for _ in SHIPPED]
    drawn = [rng.choice(VOCAB, (BLOCKS, LENGTH), p=share) for share in shares]
    return {d: torch.from_numpy(part) for d, part in zip(SHIPPED, drawn, strict=True)}


def verdicts(model: Any, blocks: dict[str, Tensor], seed: int) -> list[str]:
    counted = count_routing(RouterReader(model), blocks, batch_size=8, seed=seed)
    tables = {
        "information": information_table(counted.layers, Resampling(99, 20, seed)),
        "routing": routing_summary(counted.layers),
    }
    named = {name: table.assign(run="one") for name, table in tables.items()}
    (finding,) = summarise([{"name": "one"}], named)
    return [layer.verdict for layer in finding.layers]


def test_untrained_models_do_not_follow_domains() -> None:
    """Their routers tell of the domain, p < 0.05 against permuted domains, as any router does."""
    found = [
        verdict
        for family in FAMILIES[:4]
        for seed in range(5)
        for verdict in verdicts(tiny_mixture(family, seed), text(seed), seed)
    ]
    assert len(found) == 40
    assert sum(verdict == MORE for verdict in found) <= 0.05 * len(found)
    assert sum("no more than random routers" in verdict for verdict in found) > 0.7 * len(found)


def tell_the_domain(model: Any, blocks: dict[str, Tensor]) -> None:
    """Every router becomes a linear probe for the domain, on the states that it reads."""
    labels_T = torch.arange(len(SHIPPED)).repeat_interleave(BLOCKS * LENGTH)
    targets_TD = torch.nn.functional.one_hot(labels_T, len(SHIPPED)).double() - 1 / len(SHIPPED)
    for layer in model.moe_layers().values():
        states: list[Tensor] = []
        hook = layer.router.register_forward_pre_hook(
            lambda _, inputs, states=states: states.append(inputs[0].double())
        )
        for part in blocks.values():
            model(input_ids=part)
        hook.remove()
        probe_HD = torch.linalg.lstsq(torch.cat(states), targets_TD).solution
        layer.router.weight.zero_()[: len(SHIPPED)] = probe_HD.T.float()


@torch.no_grad()
@pytest.mark.parametrize("seed", range(5))
def test_routers_told_the_domain_follow_it(seed: int) -> None:
    model, blocks = tiny_mixture("learned", seed), text(seed)
    tell_the_domain(model, blocks)
    assert set(verdicts(model, blocks, seed)) == {MORE}


@given(st.integers(1, 12), st.integers(0, 2**31), st.floats(0, 1))
def test_p_is_that_of_a_count_over_draws(layers: int, seed: int, common: float) -> None:
    rng = np.random.default_rng(seed)
    draws = rng.normal(size=(layers, 20)) + common * rng.normal(size=20)
    observed, null = draws[:, 0], draws[:, 1:]
    scaled = (draws - draws.mean(axis=1)[:, None]) / draws.std(axis=1)[:, None]
    for layer, p in enumerate(largest_of_layers(observed, null)):
        reached = sum(max(scaled[:, n]) >= scaled[layer, 0] for n in range(1, 20))
        assert p == (1 + reached) / 20


def test_any_layer_of_models_without_effect_is_below_five_percent_in_five_percent() -> None:
    """Sixteen layers that depend on each other, 2,000 models, against 99 draws each."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(2000):
        draws = rng.gamma(2.0, size=(16, 100)) + rng.gamma(2.0, size=100)
        found += largest_of_layers(draws[:, 0], draws[:, 1:]).min() <= 0.05
    assert 0.03 < found / 2000 < 0.065


def test_draws_that_do_not_differ_prove_nothing() -> None:
    assert largest_of_layers(np.zeros(2), np.zeros((2, 99))).tolist() == [1.0, 1.0]

"""Knock-out and similarity against models changed by hand, for every family."""

import copy

import numpy as np
import pytest
import torch
from routing_models import FAMILIES, tiny_mixture

from moe_emergence.analysis.ablation import block_losses
from moe_emergence.analysis.checkpoints import _common
from moe_emergence.analysis.knockout import knockout_table, mean_losses
from moe_emergence.analysis.routers import RouterReader, find_routers
from moe_emergence.analysis.similarity import compare_experts, stacked_weights
from moe_emergence.analysis.training_curves import collapse_table, training_tables
from moe_emergence.run_folder import MetricsWriter, RunFolder

BLOCKS = {
    name: torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(seed))
    for seed, name in enumerate(("code", "math", "prose"))
}


@pytest.mark.parametrize("family", [*FAMILIES, "hash"])
def test_a_zeroed_expert_is_one_whose_last_product_is_zero(family: str) -> None:
    model = tiny_mixture(family)
    before = copy.deepcopy(model.state_dict())
    table = knockout_table(model, BLOCKS, 4, batch_size=2)
    assert set(table["how"]) == {"zeroed"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    router = find_routers(model)[-1]
    broken = copy.deepcopy(model)
    experts = broken.get_submodule(router.name.rpartition(".")[0]).experts
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            if name in ("down_proj", "down_proj_bias", "w2", "w2_bias"):
                parameter[2] = 0
    expected = mean_losses(block_losses(broken, BLOCKS, 3), BLOCKS)
    rows = table[(table["layer"] == router.layer) & (table["expert"] == 2)].set_index("domain")
    for domain, (loss, tokens) in expected.items():
        assert rows.loc[domain, "lm_loss"] == pytest.approx(loss, rel=1e-5)
        assert rows.loc[domain, "tokens"] == tokens
    assert table["increase"].abs().max() > 1e-4


@pytest.mark.parametrize("family", ["learned", "frozen"])
def test_a_rerouted_expert_is_one_the_router_cannot_see(family: str) -> None:
    model = tiny_mixture(family)
    table = knockout_table(model, BLOCKS, 4)
    assert set(table["how"]) == {"rerouted"}
    router = find_routers(model)[0]
    # a model that never had expert 1: three experts, and three rows in the router
    broken = copy.deepcopy(model)
    layer = broken.moe_layers()[router.layer]
    keep = [0, 2, 3]
    layer.experts.num_experts = 3
    with torch.no_grad():
        for name in ("w1", "w1_bias", "w2", "w2_bias"):
            setattr(layer.experts, name, torch.nn.Parameter(getattr(layer.experts, name)[keep]))
        weight = layer.router.weight[keep].clone()
        if family == "frozen":
            layer.router.weight = weight
        else:
            layer.router.weight = torch.nn.Parameter(weight)
    expected = mean_losses(block_losses(broken, BLOCKS, 8), BLOCKS)
    rows = table[(table["layer"] == router.layer) & (table["expert"] == 1)].set_index("domain")
    for domain, (loss, _) in expected.items():
        assert rows.loc[domain, "lm_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "learned"])
def test_cosines_of_weights_and_outputs(family: str) -> None:
    model = tiny_mixture(family)
    reader = RouterReader(model)
    layer = reader.routers[-1]
    experts = model.get_submodule(layer.name.rpartition(".")[0]).experts
    stacked = stacked_weights(experts)
    assert stacked is not None
    with torch.no_grad():  # experts 0 and 3 alike
        for parameter in stacked.values():
            parameter[3] = parameter[0]
    found = compare_experts(reader, BLOCKS["code"])
    table = found.similarity[found.similarity["layer"] == layer.layer]
    table = table.set_index(["kind", "expert", "other_expert"])["cosine"]
    for kind in ("weights", "moved", "outputs"):
        assert table[kind, 0, 3] == pytest.approx(1, abs=1e-5)
        assert abs(table[kind, 0, 1]) < 0.99
        assert table[kind, 1, 2] == pytest.approx(table[kind, 2, 1])
    flat = torch.cat([p.detach().flatten(1) for p in stacked.values()], 1).numpy()
    cosine = flat[1] @ flat[2] / np.linalg.norm(flat[1]) / np.linalg.norm(flat[2])
    assert table["weights", 1, 2] == pytest.approx(float(cosine), abs=1e-5)
    assert set(found.movement["start"]) == {"mean expert"}


def test_saturation_ignores_the_order_of_slots() -> None:
    then = torch.tensor([[0, 1], [2, 3], [0, 2]])
    now = torch.tensor([[1, 0], [2, 0], [1, 3]])
    assert _common(then, now) == pytest.approx((1 + 0.5 + 0) / 3)
    assert _common(then, then) == 1


def test_training_tables_are_the_metrics(tmp_path: object) -> None:
    run = RunFolder(tmp_path)  # type: ignore[arg-type]
    loads = {"router/layer_2_expert_0_frac": 0.7, "router/layer_2_expert_1_frac": 0.3}
    MetricsWriter(run.metrics).append(
        [
            {"step": 5, "train/lm_loss": 3.5, **loads, "router/layer_2_entropy": 0.6},
            {"step": 6, "eval/lm_loss_code": 2.0},
        ]
    )
    tables = training_tables(run.metrics)
    assert tables["training"].to_dict("records") == [
        {"step": 5, "metric": "train/lm_loss", "value": 3.5},
        {"step": 6, "metric": "eval/lm_loss_code", "value": 2.0},
    ]
    assert tables["load_over_training"]["fraction"].tolist() == [0.7, 0.3]
    assert tables["entropy_over_training"].iloc[0].to_dict() == {
        "step": 5, "layer": 2, "entropy": 0.6,
    }  # fmt: skip
    row = collapse_table(tables["load_over_training"]).iloc[0]
    assert (row["largest_share"], row["max_violation"]) == (0.7, pytest.approx(0.4))

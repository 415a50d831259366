"""Route regret: what another expert would have done, against every exchange made by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from routing_models import tiny_mixture
from small_models import ids, make_model
from torch.nn import functional

from moe_emergence.analysis.regret import PLACES, regret_table
from moe_emergence.analysis.routers import RouterReader
from moe_emergence.moe import TopKRouter


def by_hand(model, tokens: torch.Tensor, top_k: int, layer: int) -> dict[tuple[int, int], list]:
    """Losses of the token after each place with all options, one sequence and pass at a time."""
    router = model.moe_layers()[layer].router
    found = {}
    for row, text in enumerate(tokens):
        for place in range(len(text) - 1):
            (chosen,) = (
                d.topk_experts[place].tolist()
                for d, i in zip(model(text[None]).router_decisions, (1, 3), strict=True)
                if i == layer
            )
            losses = []
            for expert in [chosen[-1], *(e for e in range(4) if e not in chosen)]:

                def exchange(module, inputs, output, place=place, expert=expert):
                    output.topk_experts[place, -1] = expert
                    return replace(output, sums=None)

                handle = router.register_forward_hook(exchange)
                logits = model(text[None]).logits[0, place]
                handle.remove()
                losses.append(float(functional.cross_entropy(logits, text[place + 1])))
            found[row, place] = losses
    return found


@pytest.mark.parametrize("top_k", [1, 2])
@torch.no_grad()
def test_figures_are_those_of_exchanges_made_by_hand(top_k: int) -> None:
    model = make_model(top_k).eval()
    blocks = {"code": ids(3, 8), "prose": ids(2, 8, seed=9)}
    table = regret_table(model, blocks, 4, top_k, batch_size=2, seed=7)
    assert list(table["layer"]) == [1, 1, 3, 3]
    rng = np.random.default_rng(7)
    losses = {(layer, domain): [] for layer in (1, 3) for domain in blocks}
    exact = {key: by_hand(model, blocks[key[1]], top_k, key[0]) for key in losses}
    for domain, rows in blocks.items():
        for first in range(0, len(rows), 2):
            for _ in range(PLACES):
                places = rng.integers(0, 7, len(rows[first : first + 2]))
                for layer in (1, 3):
                    losses[layer, domain] += [
                        exact[layer, domain][first + row, place] for row, place in enumerate(places)
                    ]
    for row in table.to_dict("records"):
        found = np.array(losses[row["layer"], row["domain"]])
        assert row["tokens"] == len(found)
        assert row["options"] == found.shape[1] == 5 - top_k
        own, best, mean = found[:, 0], found.min(axis=1), found.mean(axis=1)
        assert row["lm_loss"] == pytest.approx(own.mean(), rel=1e-5)
        assert row["regret"] == pytest.approx((own - best).mean(), abs=1e-5)
        assert row["random_regret"] == pytest.approx((mean - best).mean(), abs=1e-5)
        assert row["gain"] == pytest.approx((mean - own).mean(), abs=1e-5)
        assert row["gain_low"] <= row["gain"] <= row["gain_high"]
        assert row["best"] == pytest.approx((own == best).mean())


@pytest.mark.parametrize("good", [True, False])
@torch.no_grad()
def test_a_router_is_told_from_one_that_chooses_the_worst(good: bool) -> None:
    """Expert 0 is the model's own, of which the text is the most likely; the others are broken."""
    model = make_model(1, noise=0.0).eval()
    for layer in model.moe_layers().values():
        layer.experts.w2[1:] *= -8
        assert isinstance(layer.router, TopKRouter)

        def choose(module, inputs, output, expert=0 if good else 1):
            return replace(
                output, topk_experts=torch.full_like(output.topk_experts, expert), sums=None
            )

        layer.router.register_forward_hook(choose)
    own = make_model(1, noise=0.0).eval()
    text = own.generate(ids(6, 1), max_new_tokens=15, do_sample=False, pad_token_id=0)
    table = regret_table(model, {"code": text}, 4, 1)
    if good:
        assert (table["best"] > 0.9).all()
        assert (table["gain_low"] > 0).all()
        assert (table["regret"] < 0.01 * table["random_regret"]).all()
    else:
        assert (table["gain_high"] < 0).all()


def test_the_model_is_as_it_was_and_other_families_can_be_asked() -> None:
    model = tiny_mixture("mixtral").train()
    tokens = {"math": torch.randint(0, 40, (2, 9))}
    with RouterReader(model).reading() as reader:
        before = reader.read(tokens["math"])
    table = regret_table(model, tokens, 4, 2)
    assert model.training
    assert (table["options"] == 3).all()
    assert (table["regret"] >= 0).all()
    assert (table["regret"] - table["random_regret"] + table["gain"]).abs().max() < 1e-9
    with RouterReader(model).reading() as reader:
        for one, other in zip(before, reader.read(tokens["math"]), strict=True):
            assert torch.equal(one.experts_TK, other.experts_TK)

"""The module test: a router told the domain passes, one that goes by the position does not."""

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from moe_emergence.analysis.ablation import block_losses, without_experts
from moe_emergence.analysis.module_sets import most_selective, rivals_of, total_load
from moe_emergence.analysis.modules import RANDOM_SETS, halves, judge, module_tables, name_on
from moe_emergence.analysis.routers import find_routers
from moe_emergence.config import SHIPPED
from moe_emergence.models import MoEGPT2LMHeadModel, upcycle

VOCAB, LENGTH, E = 24, 16, 8
Blocks = dict[str, Tensor]


def chains(rows: int, seed: int) -> Blocks:
    """Each domain is a walk over all tokens by transitions of its own: only context tells them."""
    found = {}
    for place, domain in enumerate(SHIPPED):
        table = np.random.default_rng(place).dirichlet(np.full(VOCAB, 0.08), VOCAB)
        rng = np.random.default_rng([seed, place])
        walks = np.zeros((rows, LENGTH), np.int64)
        walks[:, 0] = place
        for step in range(1, LENGTH):
            for row in range(rows):
                walks[row, step] = rng.choice(VOCAB, p=table[walks[row, step - 1]])
        found[domain] = torch.from_numpy(walks)
    return found


def trained(by: str, steps: int = 150) -> MoEGPT2LMHeadModel:
    """A mixture on the chains whose routers go by the domain or by the position."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = upcycle(GPT2LMHeadModel(config), [0, 1], E, 1, router="frozen")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batches = [chains(8, 1000 + n) for n in range(20)]
    decide_by(model, by)
    for step in range(steps):
        ids = torch.cat(list(batches[step % 20].values()))
        model(input_ids=ids, labels=ids).lm_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def decide_by(model: MoEGPT2LMHeadModel, by: str) -> None:
    """Two experts for each domain, known from the sequence's first token, or one a position."""
    asked: list[Tensor] = []

    def see(module: Any, args: Any, kwargs: Any) -> None:
        asked[:] = [kwargs["input_ids"]]

    def decide(module: Any, inputs: Any) -> Any:
        ids = asked[0]
        place = torch.arange(ids.shape[1]).expand_as(ids) % E
        if by == "domain":
            place = 2 * ids[:, :1] + ids % 2
        place = place.reshape(-1)
        told = torch.nn.functional.one_hot(place, E).float()
        return (told @ torch.linalg.pinv(module.weight).T.float(), *inputs[1:])

    model.register_forward_pre_hook(see, with_kwargs=True)
    for layer in model.moe_layers().values():
        layer.router.register_forward_pre_hook(decide)


def judged(model: MoEGPT2LMHeadModel, corpora: dict[str, Blocks]) -> dict[str, pd.DataFrame]:
    return module_tables(model, name_on(model, chains(24, 1)), corpora, eos_id=VOCAB, most=24)


@pytest.fixture(scope="module")
def told() -> MoEGPT2LMHeadModel:
    return trained("domain")


def test_a_model_told_the_domain_passes_on_every_text(told: MoEGPT2LMHeadModel) -> None:
    tables = judged(told, {"other half": chains(24, 2), "second": chains(24, 3)})
    table = tables["modules"]
    assert list(table["corpus"]) == ["other half"] * 3 + ["second"] * 3
    assert table["passes"].all()
    assert list(table["experts"][:3]) == [f"0: {n} {n + 1}; 1: {n} {n + 1}" for n in (0, 2, 4)]
    assert (table["off_target"].abs() < 0.01).all()
    assert (table["sets"] == RANDOM_SETS).all()
    assert np.allclose(table["load"], table["random_load"], atol=0.02)
    damage = tables["module_damage"].query("corpus == 'second'")
    own = damage[damage["domain"] == damage["on"]]["damage"]
    others = damage[damage["domain"] != damage["on"]]["damage"]
    assert own.min() > 10 * others.abs().max()


def test_a_router_that_knows_nothing_of_domains_fails() -> None:
    table = judged(trained("position"), {"other half": chains(24, 2)})["modules"]
    assert table["passes"].sum() == 0


def test_damage_is_that_of_a_model_without_the_experts(told: MoEGPT2LMHeadModel) -> None:
    blocks = chains(6, 4)
    naming = name_on(told, chains(24, 1))
    tables = module_tables(told, naming, {"x": blocks}, eos_id=VOCAB, most=6)
    row = tables["modules"].iloc[0]
    module = most_selective(naming.selectivity["code"], 2)
    removed = dict(zip(find_routers(told), module, strict=True))
    whole = block_losses(told, blocks, 2)
    with without_experts(removed):
        lost = {d: loss - whole[d] for d, loss in block_losses(told, blocks, 4).items()}
    assert row["damage"] == pytest.approx(lost["code"].mean())
    assert row["off_target"] == pytest.approx((lost["math"].mean() + lost["prose"].mean()) / 2)
    assert row["damage_low"] <= row["damage"] <= row["damage_high"]
    assert (row["blocks"], row["documents"]) == (6, 1)


def test_fewer_blocks_are_taken_evenly_apart_and_keep_their_documents(
    told: MoEGPT2LMHeadModel,
) -> None:
    blocks = chains(12, 4)
    for part in blocks.values():
        part[1::2, -1] = 0  # every second block ends a document
    naming = name_on(told, chains(24, 1))
    some = module_tables(told, naming, {"x": blocks}, eos_id=0, most=6)["modules"]
    every = {domain: part[::2] for domain, part in blocks.items()}
    alone = module_tables(told, naming, {"x": every}, eos_id=VOCAB, most=6)["modules"]
    assert list(some["damage"]) == list(alone["damage"])
    assert list(some["blocks"]) == [6, 6, 6]
    assert (some["documents"] > 1).all()


@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 2), st.integers(0, 99))
def test_rivals_are_other_sets_of_that_size_and_near_in_load(
    experts: int, layers: int, size: int, seed: int
) -> None:
    size = min(size, experts - 1)
    rng = np.random.default_rng(seed)
    load = rng.dirichlet(np.ones(experts), layers)
    named = {d: most_selective(rng.random((layers, experts)), size) for d in SHIPPED}
    layer_sets = list(itertools.combinations(range(experts), size))
    every = set(itertools.product(layer_sets, repeat=layers))
    found = rivals_of(named, load, 20, seed)
    for domain, own in named.items():
        rivals = found[domain]
        assert len(set(rivals)) == len(rivals) == min(20, len(every) - 1)
        assert set(rivals) <= every - {own}
    if layers == 1:
        own, rivals = named["code"], found["code"]
        distance = sorted(abs(total_load(one, load) - total_load(own, load)) for one in every)
        mine = [abs(total_load(one, load) - total_load(own, load)) for one in rivals]
        assert mine == pytest.approx(distance[1 : 1 + len(mine)])
    assert len({one for rivals in found.values() for one in rivals}) <= 30


def test_halves_share_no_block_and_need_two() -> None:
    first, second = halves({"code": torch.arange(5)[:, None], "math": torch.arange(2)[:, None]})
    assert [len(part) for half in (first, second) for part in half.values()] == [2, 1, 3, 1]
    assert torch.equal(torch.cat([first["code"], second["code"]]), torch.arange(5)[:, None])
    with pytest.raises(ValueError, match="--test modules: math: two blocks"):
        halves({"code": torch.zeros(2, 4), "math": torch.zeros(1, 4)})


@given(st.integers(0, 1000), st.floats(-1, 3), st.floats(-1, 1), st.integers(0, 120))
def test_a_verdict_is_its_rule(seed: int, on: float, off: float, sets: int) -> None:
    rng = np.random.default_rng(seed)

    def losses(mean: float) -> dict[str, np.ndarray]:
        return {d: rng.normal(mean if d == "code" else off, 0.1, 9) for d in SHIPPED}

    named, rivals = losses(on), [losses(rng.normal(1, 0.5)) for _ in range(sets)]
    documents = {d: rng.integers(0, 9, 9) for d in SHIPPED}
    found = judge("code", named, rivals, documents, seed)
    damage = named["code"].mean()
    reached = sum(one["code"].mean() >= damage for one in rivals)
    assert found["p"] == (1 + reached) / (1 + sets)
    spill = np.mean([named[d].mean() for d in ("math", "prose")])
    enough = sets > 0 and found["damage_low"] > 0 and damage > 2 * found["random_mean"]
    assert found["passes"] == (found["p"] < 0.05 and enough and spill <= damage / 3)
    if sets < 19:
        assert not found["passes"]

"""Experts of two models are matched as brute force matches them, and what moved is counted."""

import csv
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_models import tiny_mixture
from torch import nn

from moe_emergence.analysis.diff import compare, route
from moe_emergence.analysis.matching import Choices, random_kept
from moe_emergence.analysis.routers import RouterReader, find_routers
from moe_emergence.analyze import main
from moe_emergence.data.tokenizer import train_bpe

BLOCKS = {
    "code": torch.randint(0, 300, (6, 16), generator=torch.Generator().manual_seed(1)),
    "math": torch.randint(0, 300, (4, 16), generator=torch.Generator().manual_seed(2)),
}
CELLS = [("code", "all"), ("math", "all")]
CELLS_T = np.repeat([0, 1], [96, 64]).astype(np.int16)


@st.composite
def choices(draw: Any) -> Choices:
    experts, others = draw(st.integers(2, 4)), draw(st.integers(2, 4))
    one, other = draw(st.integers(1, experts)), draw(st.integers(1, others))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    tokens = draw(st.integers(1, 30))
    return Choices(
        rng.integers(0, 2, tokens).astype(np.int16),
        rng.random((tokens, experts)).argsort(1)[:, :one].astype(np.int16),
        rng.random((tokens, others)).argsort(1)[:, :other].astype(np.int16),
        (2, experts, others),
    )


def kept_of(choices: Choices, match: dict[int, int], cell: int) -> int:
    """Token by token, with sets."""
    return sum(
        len({match.get(e) for e in one} & {*other})
        for kind, one, other in zip(
            choices.cells_T.tolist(), choices.one_TK.tolist(), choices.other_TM.tolist(),
            strict=True,
        )
        if kind == cell
    )  # fmt: skip


@given(choices())
def test_the_match_is_the_best_of_all(found: Choices) -> None:
    _, experts, others = found.shape
    overlap = found.overlap()
    match = {e: m for e, m in enumerate(overlap.match().tolist()) if m >= 0}
    assert len(match) == min(experts, others) == len({*match.values()})
    kept = [kept_of(found, match, cell) for cell in (0, 1)]
    assert overlap.kept(overlap.match()).tolist() == kept
    few, many = sorted((experts, others))
    possible = [
        dict(enumerate(order)) if experts == few else {e: i for i, e in enumerate(order)}
        for order in itertools.permutations(range(many), few)
    ]
    assert sum(kept) == max(sum(kept_of(found, one, cell) for cell in (0, 1)) for one in possible)


def renumber(model: nn.Module, orders: list[list[int]]) -> None:
    """Expert `e` of layer `i` becomes the one that was number `orders[i][e]`."""
    for router, order in zip(find_routers(model), orders, strict=True):
        owner = model.get_submodule(router.name.rpartition(".")[0])
        with torch.no_grad():
            for part in (router.module, owner.experts):
                for parameter in part.parameters():
                    parameter.copy_(parameter[order])


@pytest.mark.parametrize("family", ["learned", "mixtral", "olmoe", "gpt_oss"])
def test_renumbered_experts_are_found_and_nothing_has_moved(family: str) -> None:
    orders = [[2, 0, 3, 1], [1, 3, 2, 0]]
    model, other = tiny_mixture(family), tiny_mixture(family)
    renumber(other, orders)
    torch.testing.assert_close(
        model(input_ids=BLOCKS["code"]).logits, other(input_ids=BLOCKS["code"]).logits
    )
    one, two = route(model, BLOCKS, 4), route(other, BLOCKS, 4)
    tables = compare(CELLS, CELLS_T, one, two, 39, 0)
    match = tables["match"].groupby("layer")["other_expert"].apply(list).tolist()
    assert match == [[order.index(expert) for expert in range(4)] for order in orders]
    moved = tables["moved"]
    assert (moved["moved"] == 0).all()
    whole = moved[moved["domain"] == "all"]
    assert (whole["moved_unmatched"] > 0.3).all()
    assert (whole["p"] == 1 / 40).all()
    assert (whole["null_05"] > 0.2).all()
    assert (moved.groupby(["layer", "domain"])["tokens"].max().loc[1]
            == pd.Series({"all": 160, "code": 96, "math": 64})).all()  # fmt: skip


def test_what_moved_is_counted_in_its_domain() -> None:
    model = tiny_mixture("mixtral")
    one, other = route(model, BLOCKS, 4), route(model, BLOCKS, 4)
    experts = other.experts[1]
    free = (experts[:10, :1] + experts[:10, 1:]) % 4  # another expert than either, if it is one
    changed = [expert not in pair for expert, pair in zip(free[:, 0], experts[:10], strict=True)]
    experts[:10, 0][changed] = free[changed, 0]
    moved = compare(CELLS, CELLS_T, one, other, 19, 0)["moved"]
    moved = moved.drop_duplicates(["layer", "domain"]).set_index(["layer", "domain"])["moved"]
    assert sum(changed) > 2
    assert moved[1, "code"] == pytest.approx(sum(changed) / (2 * 96))
    assert moved[1, "math"] == moved[0, "all"] == 0


def test_random_routers_with_even_loads_keep_what_chance_keeps() -> None:
    """Of 4 experts each a quarter, and a little more since the match is made on the same tokens."""
    rng = np.random.default_rng(0)
    cells = np.zeros(4000, np.int16)
    drawn = [rng.integers(0, 4, (4000, 1)).astype(np.int16) for _ in range(2)]
    found = Choices(cells, drawn[0], drawn[1], (1, 4, 4))
    null = random_kept(found, 99, 0)[:, 0] / 4000
    observed = found.overlap().kept(found.overlap().match())[0] / 4000
    assert 0.25 < null.mean() < 0.28
    assert null.min() <= observed <= null.max()


def folder_of(model: Any, path: Path, words: str = "code math prose 0 1 2") -> str:
    model.save_pretrained(path)
    train_bpe([words], 280).save_pretrained(path)
    return str(path)


@pytest.mark.slow
def test_the_command_writes_tables_and_a_figure(
    tmp_path: Path, data_folder: Path, cache_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between families, with other numbers of experts per token."""
    one = folder_of(tiny_mixture("mixtral"), tmp_path / "one")
    other = folder_of(tiny_mixture("deepseek_v3"), tmp_path / "other")
    out = tmp_path / "out"
    flags = ["--diff", "--data", str(data_folder), "--block-size", "16", "--max-tokens", "900",
             "--permutations", "19", "--device", "cpu", "--cache-dir", str(cache_folder),
             "--out", str(out)]  # fmt: skip
    assert main([one, other, *flags]) == 0
    printed = capsys.readouterr().out
    assert "Experts of one against those of other" in printed
    with (out / "tables/moved.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["layer"] for row in rows} == {"1"}  # the other model's first layer is dense
    assert {row["domain"] for row in rows} == {"all", "code", "math", "prose"}
    assert {"keyword", "number", "content word"} & {row["token_type"] for row in rows}
    # types add up to their domain
    table = pd.read_csv(out / "tables/moved.csv")
    for _, part in table[table["domain"] != "all"].groupby("domain"):
        whole, types = part[part["token_type"] == "all"], part[part["token_type"] != "all"]
        assert types["tokens"].sum() == whole["tokens"].iloc[0]
        weighted = (types["tokens"] * types["moved"]).sum() / types["tokens"].sum()
        assert weighted == pytest.approx(whole["moved"].iloc[0], abs=1e-5)
    assert (out / "figures/overlap.png").is_file()
    assert (out / "figures/overlap.svg").is_file()
    third = folder_of(tiny_mixture("mixtral"), tmp_path / "third", "other words entirely 7 8 9")
    with pytest.raises(ValueError, match=r"--diff: the tokenizers of one and third differ"):
        main([one, third, *flags])
    for words, message in (
        ([one, "--diff"], "--diff .* it compares two sources, not 1"),
        ([one, other, *flags, "--test", "modules"], "--test modules with --diff"),
        ([one, other, *flags, "--gallery", "g.md"], "--gallery with --diff"),
    ):
        with pytest.raises(ValueError, match=message):
            main(words)


def test_layers_that_only_one_has_are_left_out() -> None:
    one = route(tiny_mixture("mixtral"), BLOCKS, 4)
    other = route(tiny_mixture("learned"), BLOCKS, 4)
    assert RouterReader(tiny_mixture("learned")).layers == [1, 2]
    tables = compare(CELLS, CELLS_T, one, other, 19, 0)
    assert set(tables["moved"]["layer"]) == {1}
    other.experts.pop(1)
    assert compare(CELLS, CELLS_T, one, other, 19, 0) == {}

"""People's own domains, from the text to the figures: as many as they have, by their names."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moe_emergence import analyze
from moe_emergence.analysis.figures.subjects import plot_training
from moe_emergence.analysis.token_types import TOKEN_TYPES
from moe_emergence.config import RunConfig
from moe_emergence.run_folder import RunFolder, losses_by_domain, read_json, read_metrics
from moe_emergence.training.experiment import run_experiment
from tests.conftest import tiny

FIVE = ("Recht & Gesetz", "law", "medicine", "sport", "Ärzte")


def write_texts(folder: Path, names: tuple[str, ...]) -> None:
    draw = random.Random(0)
    for name in names:
        words = [f"{name}{i}" for i in range(30)]
        texts = [" ".join(draw.choices(words, k=60)) for _ in range(40)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def trained(where: Path, names: tuple[str, ...], run_name: str) -> RunFolder:
    texts = where / f"texts of {run_name}"
    texts.mkdir()
    write_texts(texts, names)
    config: RunConfig = tiny(texts, where / "cache", where)
    config = replace(
        config,
        run_name=run_name,
        data=replace(config.data, token_types=()),
        optim=replace(config.optim, compare_null=True),
    )
    run_experiment(config)
    return RunFolder(Path(config.output_dir) / run_name)


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own")


@pytest.fixture(scope="module")
def five(where: Path) -> RunFolder:
    return trained(where, FIVE, "five")


def analysed(run: RunFolder, where: Path, *flags: str) -> Path:
    out = where / f"analysis of {run.root.name}"
    few = ("--permutations", "19", "--knockout-tokens", "200", "--max-tokens", "2000")
    cache = ("--cache-dir", str(where / "cache"))
    assert analyze.main([str(run.root), "--out", str(out), *few, *cache, *flags]) == 0
    return out


def test_metrics_and_tables_have_their_names_in_their_order(five: RunFolder) -> None:
    last = [row for row in read_metrics(five.metrics) if "eval/lm_loss" in row][-1]
    losses = losses_by_domain(last)
    assert tuple(losses) == tuple(sorted(FIVE))
    assert last["eval/lm_loss"] == pytest.approx(np.mean(list(losses.values())), rel=1e-6)
    assert read_json(five.data_manifest)["domains"].keys() == set(FIVE)


def test_an_analysis_has_them_all_or_those_that_are_chosen(five: RunFolder, where: Path) -> None:
    out = analysed(five, where)
    about = read_json(out / "analysis.json")
    assert about["domains"] == sorted(FIVE)
    for name in ("expert_domain", "knockout"):
        table = pd.read_csv(next(out.rglob(f"{name}.csv")))
        assert set(table["domain"]) - {"all"} == set(FIVE)
    curves = pd.read_csv(next(out.rglob("training.csv")))["metric"]
    panels = plot_training(pd.read_csv(next(out.rglob("training.csv")))).axes
    assert {f"eval/lm_loss_{name}" for name in FIVE} < set(curves)
    assert {axis.get_title(loc="left") or axis.get_title() for axis in panels} >= set(FIVE)
    chosen = ("sport", "law")
    assert read_json(analysed(five, where, "--domains", *chosen) / "analysis.json")[
        "domains"
    ] == list(chosen)
    told = analysed(five, where, "--token-types", "law=words", "sport=none", "medicine=math")
    types = pd.read_csv(next(told.rglob("expert_token_type.csv"))).groupby("domain")["token_type"]
    assert "sport" not in types.groups
    for domain, token_class in (("law", "words"), ("medicine", "math")):
        assert set(types.get_group(domain)) <= set(TOKEN_TYPES[token_class])
    assert "operator" not in set(types.get_group("medicine"))  # names and digits alone
    with pytest.raises(ValueError, match=r"--domains tax: the text has Recht .*; choose from"):
        analysed(five, where, "--domains", "tax")
    with pytest.raises(ValueError, match=r"--keep-experts tax: choose from Recht"):
        analysed(five, where, "--test", "modules", "--keep-experts", "tax")


def test_one_domain_works_and_what_needs_two_says_so(
    where: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(where, ("law",), "one")
    out = analysed(run, where)
    assert read_json(out / "analysis.json")["domains"] == ["law"]
    bits = pd.read_csv(next(out.rglob("information.csv"))).set_index("label").loc["domain"]
    assert bits["bits"] == 0
    with pytest.raises(ValueError, match=r"--test modules: .* give two or more with --data"):
        analysed(run, where, "--test", "modules")

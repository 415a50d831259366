"""Recipes run at several lengths: differences and information over the length of training."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from suite_folders import SEEDS, VariantPlan, random_experts, specialists, write_suite

from moe_emergence.experiments.collect import collect
from moe_emergence.experiments.description import read_suite
from moe_emergence.experiments.figures import plot_lengths
from moe_emergence.experiments.lengths import BITS, LOSS, lengths, lengths_section, recipes
from moe_emergence.experiments.modules import churn_section
from moe_emergence.experiments.report import build_report, gather
from moe_emergence.experiments.specialisation import Resampling

pytestmark = pytest.mark.slow

FEW = Resampling(permutations=19, bootstrap=10)
DENSE = VariantPlan("dense-100", model={"moe_layers": ()})
MOE = VariantPlan("moe-100", "dense-100", shift=-0.05, experts=specialists)
LONG = {"max_steps": 1000}
PLANS = (
    DENSE,
    MOE,
    VariantPlan("frozen", "dense-100", shift=0.01, model={"router": "frozen"}),
    replace(DENSE, name="dense-1000", optim=LONG),
    replace(MOE, name="moe-1000", compare_with="dense-1000", shift=-0.2, optim=LONG,
            experts=random_experts),
)  # fmt: skip


def test_recipes_differ_in_length_alone(tmp_path: Path) -> None:
    extra = replace(PLANS[-1], name="moe-2000", optim={"max_steps": 2000, "z_coef": 0.5})
    folder = write_suite(tmp_path, (*PLANS, extra), seeds=[0])
    assert recipes(collect(read_suite(folder))) == {
        "dense-100": ("dense", 100),
        "dense-1000": ("dense", 1000),
        "moe-100": ("moe", 100),
        "moe-1000": ("moe", 1000),
        "frozen": ("frozen", 100),
        "moe-2000": ("moe-2000", 2000),
    }


def test_a_seed_that_is_missing_splits_no_recipe(tmp_path: Path) -> None:
    folder = write_suite(tmp_path, PLANS, seeds=[0, 1])
    shutil.rmtree(tmp_path / "moe-1000" / "seed-0")
    assert recipes(collect(read_suite(folder)))["moe-1000"] == ("moe", 1000)


def test_what_was_planted_is_found_at_each_length(tmp_path: Path) -> None:
    evidence = gather(collect(read_suite(write_suite(tmp_path, PLANS))), 0.01, FEW)
    table = evidence.lengths
    assert list(zip(table["measure"], table["of"], table["steps"], table["n"], strict=True)) == [
        (BITS, "moe", 100, len(SEEDS)),
        (BITS, "moe", 1000, len(SEEDS)),
        (LOSS, "moe − dense", 100, len(SEEDS)),
        (LOSS, "moe − dense", 1000, len(SEEDS)),
    ]
    bits, losses = table[:2], table[2:]
    assert list(bits["mean"]) == pytest.approx([np.log2(3), 0], abs=0.1)
    assert list(losses["mean"]) == pytest.approx([-0.05, -0.2], abs=0.02)
    assert (losses["low"] < losses["mean"]).all()
    assert (losses["mean"] < losses["high"]).all()
    at_equal_flops = evidence.comparisons.assign(matched="flops")  # of no one length
    others = lengths(evidence.records, at_equal_flops, evidence.specialisation)
    assert set(others["measure"]) == {BITS}
    *_, of_bits, of_loss = lengths_section(table).splitlines()
    assert re.fullmatch(r"\| bits \| moe( \| \d\.\d\d \(\d\.\d\d to \d\.\d\d\)){2} \|", of_bits)
    assert re.fullmatch(
        r"\| loss \| moe − dense( \| -0\.\d{4} \(-0\.\d{4} to -0\.\d{4}\)){2} \|", of_loss
    )


def test_the_report_draws_and_tells_it(tmp_path: Path) -> None:
    folder = write_suite(tmp_path, PLANS, seeds=[0])
    (folder / "tables").mkdir()
    (folder / "tables/modules.csv").write_text("of earlier runs\n")
    text = build_report(folder, resampling=FEW).read_text()
    assert "## Length of training" in text
    assert "| measure | of | 100 steps | 1,000 steps |" in text
    assert "(figures/lengths.png)" in text
    table = pd.read_csv(folder / "tables/lengths.csv")
    assert not (folder / "tables/modules.csv").exists()
    assert table[["low", "high"]].isna().all(axis=None)
    axes = plot_lengths(table).axes
    assert [len(axis.containers) for axis in axes] == [1, 1]


def test_churn_of_a_long_run_stays_readable() -> None:
    steps = range(100, 3100, 100)
    churn = pd.DataFrame({"variant": "moe", "seed": 0, "step": steps, "layer": 2, "churn": 0.5})
    header = churn_section(churn).splitlines()[2].split(" | ")
    assert len(header) <= 11
    assert header[1] == "step 100"
    assert header[-1] == "step 3000 |"

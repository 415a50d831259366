"""From suite folders written by hand to tables, verdicts and the report."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from suite_folders import (
    PLANS,
    SEEDS,
    VariantPlan,
    random_experts,
    specialists,
    write_run,
    write_suite,
)

from moe_emergence.experiments.collapse_study import (
    Load,
    detect,
    forecast_score,
    judge_runs,
    scores,
    study_collapse,
)
from moe_emergence.experiments.collect import Records, collect, final_losses
from moe_emergence.experiments.comparisons import compare
from moe_emergence.experiments.description import read_suite
from moe_emergence.experiments.report import build_report, tokenizer_types
from moe_emergence.experiments.specialisation import (
    Resampling,
    against_nulls,
    read_routing,
    routing_information,
    specialisation,
)
from moe_emergence.training.collapse import CollapseDetector

pytestmark = pytest.mark.slow

FEW = Resampling(permutations=39, bootstrap=20)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def records(whole: Path) -> Records:
    return collect(read_suite(whole))


@pytest.fixture
def broken(whole: Path, tmp_path: Path) -> Path:
    """The suite with a run missing, one cut off, one failed, one unreadable, one of other data."""
    folder = tmp_path / "broken"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "moe/seed-0")
    (folder / "moe/seed-1/run_summary.json").unlink()
    write_run(folder / "moe/seed-2", PLANS[1], 2, status="failed")
    (folder / "no-z/seed-3/metrics.jsonl").write_text("not json\n")
    path = folder / "no-lb/seed-4/data_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["domains"]["code"]["eval"]["sha256"] = "other"
    path.write_text(json.dumps(manifest))
    (folder / "frozen/seed-4/environment.json").write_text('{"precision": "bf16"}')
    (folder / "hash/seed-0/routing.npz").write_bytes(b"PK\x03\x04 cut off")
    return folder


def one(table: pd.DataFrame, **values: object) -> pd.Series:
    """The only row with these values."""
    for name, value in values.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_tables_hold_every_run_and_loss(records: Records) -> None:
    assert len(records.runs) == (len(PLANS) + 1) * len(SEEDS)
    assert set(records.runs["status"]) == {"completed"}
    finals = final_losses(records)
    row = one(finals, variant="moe", seed=1, domain="all")
    rows = [
        json.loads(line)
        for line in records.suite.run("moe", 1).metrics.read_text().splitlines()
        if "eval/lm_loss" in line
    ]
    assert row["final_lm_loss"] == rows[-1]["eval/lm_loss"]
    assert row["best_lm_loss"] == min(found["eval/lm_loss"] for found in rows)
    by_layer = records.fractions.groupby(["variant", "seed", "step", "layer"])["fraction"].sum()
    assert np.allclose(by_layer, 1)


def test_planted_differences_are_found(records: Records) -> None:
    table = compare(records)
    for variant, control, planted, expected in (
        ("moe", "dense", -0.05, "better"),
        ("no-lb", "moe", 0.02, "worse"),
        ("hash", "moe", 0.07, "worse"),
    ):
        row = one(table, variant=variant, control=control, domain="all")
        assert row["mean"] == pytest.approx(planted, abs=0.006)
        assert row["verdict"] == expected
        assert row["n"] == 5
        assert row["p_holm"] >= row["p"]
    flops = one(table, variant="dense-flops", domain="all")
    assert (flops["n"], flops["matched"]) == (5, "flops")


def test_steps_that_differ_are_not_compared_unless_flops_are_matched(tmp_path: Path) -> None:
    plans = [replace(plan, matched="steps") for plan in PLANS if plan.name in
             ("dense", "moe", "dense-flops")]  # fmt: skip
    table = compare(collect(read_suite(write_suite(tmp_path, plans, seeds=(0, 1, 2)))))
    row = one(table, variant="dense-flops", domain="all")
    assert row["n"] == 0
    assert math.isnan(row["p"])
    assert "final steps 120 and 100" in row["left_out"]


def test_a_run_that_ended_early_is_not_compared_at_equal_flops(tmp_path: Path) -> None:
    plans = [plan for plan in PLANS if plan.name in ("dense", "moe", "dense-flops")]
    folder = write_suite(tmp_path, plans, seeds=(0, 1, 2))
    path = tmp_path / "dense-flops" / "seed-1" / "run_summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "final_step": 40}))
    row = one(compare(collect(read_suite(folder))), variant="dense-flops", domain="all")
    assert row["n"] == 2
    assert row["left_out"] == "seed 1: dense-flops ended at step 40 of 120"


@pytest.mark.parametrize(
    ("optim", "reason"),
    [
        ({"learning_rate": 0.5}, "unlike optim.learning_rate"),
        ({"grad_accum_steps": 2}, "16 and 8 sequences a step"),
        ({"batch_size": 4, "grad_accum_steps": 2}, ""),
    ],
)
def test_another_schedule_is_not_compared_but_another_split_is(
    tmp_path: Path, optim: dict[str, float], reason: str
) -> None:
    plans = [PLANS[0], VariantPlan("other", "dense", model={"moe_layers": ()}, optim=optim)]
    table = compare(collect(read_suite(write_suite(tmp_path, plans, seeds=(0, 1, 2)))))
    row = one(table, variant="other", domain="all")
    assert row["n"] == (0 if reason else 3)
    assert reason in row["left_out"]


def test_broken_runs_are_listed_and_left_out(broken: Path) -> None:
    found = collect(read_suite(broken))
    status = found.runs.set_index(["variant", "seed"])["status"]
    assert status["moe", 0] == "missing"
    assert status["moe", 1] == "unfinished"
    assert status["moe", 2] == "failed"
    assert status["no-z", 3] == "unreadable"
    row = one(compare(found), variant="no-lb", domain="all")
    assert (row["n"], row["seeds"]) == (1, "3")
    assert row["verdict"] == "too few seeds"
    for reason in ("moe is missing", "moe is unfinished", "moe is failed", "domains.code.eval"):
        assert reason in row["left_out"]


def test_a_run_without_its_configuration_is_left_out(tmp_path: Path) -> None:
    folder = write_suite(tmp_path, PLANS[:2], seeds=(0, 1))
    (folder / PLANS[1].name / "seed-0" / "config.json").unlink()
    assert set(judge_runs(collect(read_suite(folder)))["seed"]) == {1}


def test_pairs_of_unlike_precision_are_left_out(broken: Path) -> None:
    row = one(compare(collect(read_suite(broken))), variant="frozen", domain="all")
    assert "seed 4: precisions bf16 and fp32" in row["left_out"]


def test_report_of_a_broken_suite_says_what_is_missing(broken: Path) -> None:
    text = build_report(broken, resampling=FEW).read_text(encoding="utf-8")
    assert "| moe | 0 | missing |" in text
    assert "| no-z | 3 | unreadable |" in text
    assert "moe seed 0: no routing.npz" not in text  # it never was
    assert "hash/seed-0/routing.npz: no routing can be read" in text
    assert "fewer than 3 seeds" in text


def test_report_of_nothing(tmp_path: Path) -> None:
    folder = write_suite(tmp_path, seeds=())
    values = json.loads((folder / "suite.json").read_text())
    (folder / "suite.json").write_text(json.dumps(values | {"seeds": [0, 1]}))
    text = build_report(folder, resampling=FEW).read_text(encoding="utf-8")
    assert "0 of 14 runs ended for good" in text
    assert "**moe** cannot be compared with dense" in text
    assert not list((folder / "figures").glob("*.png"))


def test_report_has_every_section_figure_and_table(whole: Path) -> None:
    path = build_report(whole, resampling=FEW)
    text = path.read_text(encoding="utf-8")
    assert "**moe** is better than dense at equal steps" in text
    assert "at equal training FLOPs" in text
    assert "`optim.lb_coef` 0.0 (not 0.01)" in text
    assert "python -m moe_emergence.suite run synthetic" in text
    assert "| no-lb | 5 of 5 (57–100%) |" in text
    assert "Length of training" not in text
    for name in ("comparisons", "losses", "specialisation", "loads", "warning"):
        assert f"(figures/{name}.png)" in text
        assert (whole / f"figures/{name}.png").stat().st_size > 5000
    for name in ("runs", "comparisons", "specialisation_against_nulls", "collapse_runs"):
        assert len(pd.read_csv(whole / f"tables/{name}.csv"))


@pytest.mark.parametrize("change", [{"variants": None}, {"seeds": 3}, {"comparisons": [
    {"variant": "moe", "control": "unknown"}]}])  # fmt: skip
def test_a_description_that_cannot_be_used_is_refused(
    whole: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    values = json.loads((whole / "suite.json").read_text())
    (tmp_path / "suite.json").write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=r"suite\.json"):
        read_suite(tmp_path)


def test_specialists_exceed_the_null_models_and_random_routers_do_not(records: Records) -> None:
    table, problems = specialisation(records, tokenizer_types(records.suite), FEW)
    assert not problems
    row = one(table, variant="moe", seed=0, layer=2, label="domain")
    assert row["bits"] == pytest.approx(math.log2(3))
    assert row["share_of_label"] == pytest.approx(1)
    assert row["p_permutation"] == 1 / 40
    # an expert that is the domain says nothing more of the type within it
    assert (
        table[(table["variant"] == "moe") & (table["label"] == "token type")]["bits"] < 1e-9
    ).all()
    against = against_nulls(table)
    for null in ("frozen", "hash"):
        assert one(against, variant="moe", null=null, layer=2, label="domain")["verdict"] == (
            "more than the null"
        )
        assert one(against, variant="no-z", null=null, layer=2, label="domain")["verdict"] == (
            "undecided"
        )


@pytest.mark.parametrize(("setting", "other"), [("top_k", 1), ("pool_size", 0), ("steps", 100)])
def test_a_null_model_of_another_shape_is_none(setting: str, other: int, tmp_path: Path) -> None:
    """With one expert per token for a variant with two, without its pools, trained for longer."""
    two = VariantPlan(
        "two", "frozen", model={} if setting == "steps" else {setting: 2},
        optim={"max_steps": 2} if setting == "steps" else {},
        experts=lambda domains, length, seed: random_experts(
            domains, length, seed, top_k=2 if setting == "top_k" else 1
        ),
    )  # fmt: skip
    frozen = next(plan for plan in PLANS if plan.name == "frozen")
    folder = write_suite(tmp_path, [replace(frozen, compare_with=None), two], seeds=(0, 1))
    found = collect(read_suite(folder))
    table, _ = specialisation(found, tokenizer_types(found.suite), FEW)
    assert set(table[setting]) == {other, 2}
    assert one(table, variant="two", seed=0, layer=2, label="domain")["bits"] < 0.1
    assert against_nulls(table).empty


def test_a_routing_of_other_blocks_is_refused(whole: Path, tmp_path: Path) -> None:
    with np.load(whole / "moe/seed-0/routing.npz") as arrays:
        values = dict(arrays)
    values["experts"] = values["experts"][:, :3]
    np.savez(tmp_path / "routing.npz", **values)
    with pytest.raises(ValueError, match=r"routing\.npz"):
        read_routing(tmp_path / "routing.npz")


def load_of(shares: list[list[float]], every: int = 5) -> Load:
    steps = every * np.arange(1, len(shares) + 1)
    return Load(steps, {1: np.array(shares)})


def test_detector_finds_the_first_streak_and_its_onset() -> None:
    shares = [[0.5, 0.5], [0.7, 0.3], [0.5, 0.5], [0.3, 0.7], [0.3, 0.7], [0.2, 0.8], [0.1, 0.9]]
    found = detect(load_of(shares), 0.6, 3, every=5)
    assert found is not None
    assert (found.step, found.onset, found.layer, found.expert) == (30, 20, 1, 1)
    assert detect(load_of(shares), 0.6, 5, every=5) is None
    trainer = CollapseDetector(0.6, 3)
    steps = [
        s for s, row in zip(range(5, 40, 5), shares, strict=True) if trainer.check(s, {1: row})
    ]
    assert steps[0] == found.step


def test_scores_at_a_step_do_not_depend_on_later_steps() -> None:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(4), size=12)
    whole_run = scores(load_of(shares.tolist()), horizon=25)
    for end in (1, 2, 3, 7, 12):
        part = scores(load_of(shares[:end].tolist()), horizon=25)
        for name, values in part.items():
            assert values == pytest.approx(whole_run[name][:end]), name


def test_forecast_follows_a_line_and_not_a_fall() -> None:
    rising = [[0.1 + 0.05 * t, 0.9 - 0.05 * t] for t in range(6)]
    assert forecast_score(load_of(rising), horizon=0)[-1] == pytest.approx(0.65)
    growing = [[0.1 + 0.02 * t, 0.45 - 0.01 * t, 0.45 - 0.01 * t] for t in range(6)]
    expected = max(0.2 + 0.02 / 5 * 50, 0.40)
    assert forecast_score(load_of(growing), horizon=50)[-1] == pytest.approx(expected)


def test_collapses_are_foreseen_and_healthy_runs_are_not_warned_of(records: Records) -> None:
    study = study_collapse(records)
    assert (study.collapsed, study.healthy) == (5, 20)
    assert (study.warned, study.false_alarms) == (5, 0)
    assert one(study.ranking, score="forecast")["auc"] == 1
    ill = study.runs[study.runs["collapsed"]]
    assert set(ill["variant"]) == {"no-lb"}
    assert (ill["lead_steps"] > ill["collapse_step"] - ill["onset_step"]).all()
    assert (ill["expert"] == 0).all()


def test_runs_that_cannot_collapse_are_not_judged(tmp_path: Path) -> None:
    top2 = VariantPlan("top2", model={"top_k": 2}, experts=random_experts)
    study = study_collapse(collect(read_suite(write_suite(tmp_path, [top2], seeds=(0, 1)))))
    assert not study.runs["judged"].any()
    assert study.roc.empty
    assert study.collapsed == study.healthy == 0


def test_a_frozen_router_that_started_at_clusters_is_no_null_model(tmp_path: Path) -> None:
    at_clusters = {"router": "frozen", "router_init": "clusters"}
    plans = (
        VariantPlan("frozen", model={"router": "frozen"}),
        VariantPlan("clusters", "frozen", model=at_clusters, experts=specialists),
    )
    folder = write_suite(tmp_path, plans)
    records = collect(read_suite(folder))
    table, _ = specialisation(records, lambda routing, seed, classes: None, FEW)
    assert set(table["router"]) == {"frozen", "frozen at clusters"}
    against = against_nulls(table)
    assert set(zip(against["variant"], against["null"], strict=True)) == {("clusters", "frozen")}
    assert set(against["verdict"]) == {"more than the null"}


def test_domains_of_no_class_have_no_types(tmp_path: Path) -> None:
    plan = VariantPlan("frozen", model={"router": "frozen"})
    suite = read_suite(write_suite(tmp_path, (plan,), seeds=(0,)))
    routing = read_routing(suite.routing("frozen", 0))
    types = np.zeros(routing.token_ids.shape, np.int8)
    classes = {"code": "python", "math": "none", "prose": "words"}
    rows = list(routing_information(routing, types, classes, 4, FEW))
    labels = {row["label"] for row in rows}
    assert labels == {"domain", "token type", "token type: code", "token type: prose"}


def test_modules_and_churn_of_runs_are_in_the_report(tmp_path: Path) -> None:
    folder = write_suite(tmp_path, PLANS[:2])
    columns = {
        "corpus": "second half", "damage": 0.25, "random_mean": 0.0625, "random_95": 0.1,
        "off_target": 0.01, "load": 0.25, "random_load": 0.24,
    }  # fmt: skip
    for seed in SEEDS:
        rows = [
            {"domain": d, "passes": d == "math" and seed < 3, **columns} for d in ("code", "math")
        ]
        pd.DataFrame(rows).to_csv(folder / f"moe/seed-{seed}/modules.csv", index=False)
        with (folder / f"moe/seed-{seed}/metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 100, "eval/layer_2_churn": 0.2}) + "\n")
            file.write(json.dumps({"step": 100, "eval/layer_3_churn": 0.4}) + "\n")
    text = build_report(folder, resampling=FEW).read_text()
    assert "| moe | math | 3 of 5 (23–88%) | 0.2500 |" in text
    assert "| moe | code | 0 of 5 (0–43%) | 0.2500 |" in text
    assert "| moe | 30% |" in text
    assert len(pd.read_csv(folder / "tables/modules.csv")) == 10
    assert len(pd.read_csv(folder / "tables/churn.csv")) == 10


def test_a_report_of_some_variants_says_nothing_of_others(tmp_path: Path) -> None:
    folder = write_suite(tmp_path, PLANS)
    for name in ("frozen", "no-lb"):
        shutil.rmtree(folder / name)
    text = build_report(folder, resampling=FEW, only=["moe", "dense"]).read_text()
    assert "**moe** is better than dense" in text
    assert "All of them completed." in text
    assert "no-lb" not in text
    assert "| frozen |" not in text
    runs = pd.read_csv(folder / "tables/runs.csv")
    assert set(runs["variant"]) == {"base", "moe", "dense"}
    with pytest.raises(ValueError, match="--only big: choose from dense"):
        build_report(folder, only=["moe", "big"])

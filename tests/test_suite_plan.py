"""Suites as data: what differs between their runs, what they cost, and what is refused."""

import itertools
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import llama_models
import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from moe_emergence import suite as command
from moe_emergence.config import ModelConfig, RunConfig
from moe_emergence.experiments.comparisons import config_differences
from moe_emergence.experiments.description import BASE, read_suite
from moe_emergence.experiments.estimate import (
    Estimate,
    VariantCost,
    estimate,
    estimate_table,
    refuse_over_budget,
)
from moe_emergence.experiments.flops import (
    base_config,
    steps_for,
    training_flops,
    training_flops_per_token,
)
from moe_emergence.experiments.plan import (
    PlannedRun,
    describe,
    plan_runs,
    variant_configs,
)
from moe_emergence.experiments.suite_file import built_in, load_suite
from moe_emergence.experiments.variants import with_changes
from moe_emergence.models import loading, upcycle
from moe_emergence.models.lower_layers import (
    freeze_lower_layers,
    lower_states,
    lower_states_given,
)
from moe_emergence.presets import demo
from moe_emergence.settings import to_dict

SUITES = built_in()
TINY = Path(__file__).parent / "tiny_suite.toml"


@pytest.mark.parametrize("name", SUITES)
def test_a_variant_differs_from_the_one_it_is_like_in_exactly_the_named_fields(name: str) -> None:
    suite = load_suite(name)
    configs = variant_configs(suite, {})
    likened = [variant for variant in suite.variants if variant.like is not None]
    assert likened
    for variant in likened:
        found = config_differences(to_dict(configs[variant.name]), to_dict(configs[variant.like]))
        named = set(variant.changes) | ({"optim.max_steps"} if variant.flops_of else set())
        assert set(found) == named, variant.name


@pytest.mark.parametrize("name", SUITES)
def test_variants_of_a_seed_share_data_base_and_order_and_nothing_else_is_shared(
    name: str, tmp_path: Path
) -> None:
    suite = load_suite(name)
    runs = plan_runs(suite, tmp_path)
    assert len({run.run.root for run in runs}) == len(runs)
    assert len(runs) == len(suite.seeds) * (len(suite.variants) + (suite.base is not None))
    assert len({run.config.data.split_seed for run in runs}) == 1
    for seed, group in itertools.groupby(runs, key=lambda run: run.seed):
        ordered = list(group)
        own = [run for run in ordered if run.variant != BASE]
        assert {run.config.seed for run in own} == {seed}
        assert len({(run.config.model.base, run.config.data) for run in own}) == 1
        if suite.base is not None:
            base = ordered[0]
            assert base.variant == BASE
            assert base.config.model.moe_layers == ()
            assert base.config.seed not in suite.seeds
            assert own[0].config.model.base == str(base.run.final_model)


def test_the_issue_s_questions_are_asked_with_five_seeds() -> None:
    asked = set()
    for suite in (load_suite("demo"), load_suite("ablations")):
        assert len(suite.seeds) >= 5
        asked |= {variant.name for variant in suite.variants}
    assert asked >= {
        "no-lb", "no-lb-no-noise", "balance-micro", "expert-bias", "no-z", "top2", "plain-weight",
        "experts-4", "experts-16", "layers-1", "layers-all",
    }  # fmt: skip


def tiny_config(**model: object) -> RunConfig:
    start = demo()
    shape = ModelConfig(
        base="scratch", n_layer=3, n_embd=16, n_head=2, moe_layers=(0, 2), num_experts=4
    )
    return replace(
        start,
        model=replace(shape, **model),
        data=replace(start.data, block_size=8, vocab_size=300),
        optim=replace(start.optim, batch_size=3, grad_accum_steps=2, max_steps=10),
    )


@pytest.mark.parametrize("kind", ["scratch", "llama", "llama-untied", "qwen3"])
@pytest.mark.parametrize(
    "model",
    [
        {"moe_layers": ()}, {}, {"top_k": 3}, {"router": "frozen"}, {"router": "hash", "top_k": 2},
        {"frozen_layers": 1, "moe_layers": (1, 2)}, {"frozen_layers": 1, "moe_layers": ()},
    ],
    ids=["dense", "top1", "top3", "frozen", "hash", "frozen-layer", "frozen-layer-dense"],
)  # fmt: skip
def test_flops_are_those_that_torch_counts(
    model: dict[str, object], kind: str, tmp_path: Path
) -> None:
    if kind == "scratch":
        dense = GPT2LMHeadModel(
            GPT2Config(vocab_size=300, n_positions=8, n_layer=3, n_embd=16, n_head=2)
        )
    else:
        dense = llama_models.make_dense(kind)
        dense.save_pretrained(tmp_path)
        model = {**model, "base": str(tmp_path)}
    config = tiny_config(**model)
    shape = config.model
    language_model = dense
    if shape.moe_layers:
        language_model = upcycle(
            dense, shape.moe_layers, shape.num_experts, shape.top_k, router=shape.router,
            dispatch="sequential",
        )  # fmt: skip
    language_model.set_attn_implementation("eager")
    ids = torch.randint(60, (5, 8))
    lower: AbstractContextManager[None] = nullcontext()
    if shape.frozen_layers:
        freeze_lower_layers(language_model, 1)
        lower = lower_states_given(language_model, 1, lower_states(language_model, 1, ids))
    with lower, FlopCounterMode(display=False) as counter:
        language_model.train()(input_ids=ids, labels=ids).loss.backward()
    assert counter.get_total_flops() == ids.numel() * training_flops_per_token(config)


def test_matched_steps_cost_what_they_are_to_match() -> None:
    top2, dense = tiny_config(top_k=2), tiny_config(moe_layers=())
    flops = training_flops(top2)
    steps = steps_for(flops, dense)
    assert steps > top2.optim.max_steps
    spent = training_flops(replace(dense, optim=replace(dense.optim, max_steps=steps)))
    assert abs(spent - flops) <= spent / steps / 2
    suite = load_suite("demo")
    configs = variant_configs(suite, {})
    for variant in (v for v in suite.variants if v.flops_of):
        flops = training_flops(configs[variant.flops_of])
        assert training_flops(configs[variant.name]) == pytest.approx(flops, rel=0.005)


def test_suite_json_is_read_back_by_the_report(tmp_path: Path) -> None:
    suite = load_suite("demo")
    (tmp_path / "suite.json").write_text(json.dumps(describe(suite, ["python", "x"])))
    found = read_suite(tmp_path)
    assert [v.name for v in found.variants] == [v.name for v in suite.variants]
    assert found.comparisons == suite.comparisons
    assert found.seeds == suite.seeds
    steps = next(v for v in found.variants if v.name == "dense-flops").changes["optim.max_steps"]
    assert steps > 300


def test_a_base_is_whole_and_shares_the_split_of_its_variants(tmp_path: Path) -> None:
    changes = {"data.split_seed": None, "model.frozen_layers": 1}
    suite = replace(load_suite(str(TINY)), changes={**load_suite(str(TINY)).changes, **changes})
    for seed, group in itertools.groupby(
        plan_runs(replace(suite, seeds=(3, 4)), tmp_path), key=lambda run: run.seed
    ):
        base, *variants = group
        assert base.config.model.frozen_layers == 0
        assert {run.config.model.frozen_layers for run in variants} == {1}
        # else the base would be trained on what the variants are evaluated on
        assert {run.config.data.split_seed for run in (base, *variants)} == {seed}


def test_what_the_command_line_says_goes_before_what_a_variant_says() -> None:
    suite = load_suite(str(TINY))
    other = replace(suite.variants[0], changes={**suite.variants[0].changes, "data.data": "hub"})
    suite = replace(suite, variants=(other, *suite.variants[1:]))
    configs = variant_configs(suite, {"data.data": "embedded"})
    assert {config.data.data for config in configs.values()} == {"embedded"}


BROKEN = {
    "not toml": ("seeds = [", "not TOML"),
    "no variants": ('preset = "demo"\nseeds = [0]\n', "not a suite"),
    "unknown like": (
        'preset = "demo"\nseeds = [0]\n[[variants]]\nname = "a"\nlike = "b"\n',
        "a builds on b, which is not above it",
    ),
    "twice": (
        'preset = "demo"\nseeds = [0]\n[[variants]]\nname = "a"\n[[variants]]\nname = "a"\n',
        "a is there twice",
    ),
    "misspelt key": (
        'preset = "demo"\nseeds = [0]\nsteps = 3\n[[variants]]\nname = "a"\n',
        "steps",
    ),
    "unknown control": (
        'preset = "demo"\nseeds = [0]\n[[variants]]\nname = "a"\ncompare_with = "b"\n',
        "compares b",
    ),
    "seed twice": ('preset = "demo"\nseeds = [1, 1]\n[[variants]]\nname = "a"\n', "seed twice"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_suite_is_refused_naming_the_file(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.toml") as caught:
        load_suite(str(path))
    assert message in str(caught.value)


def test_unknown_suites_settings_and_presets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="suite nothing: there is none; give one of ablations"):
        load_suite("nothing")
    with pytest.raises(ValueError, match=r"here: there is no setting optim\.steps"):
        with_changes(demo(), {"optim.steps": 1}, "here")
    with pytest.raises(ValueError, match="here: --top-k 9"):
        with_changes(demo(), {"model.top_k": 9}, "here")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("optim.max_steps", "many", "--max-steps many: give a whole number"),
        ("optim.max_steps", 1.5, r"--max-steps 1\.5: give a whole number"),
        ("optim.max_steps", [1, 2], "2"),
        ("optim.compare_dense", 3, "--compare-dense"),
        ("model.router", "hsah", "'hsah' for argument '--router'"),
        ("model.moe_layers", ["two"], "--moe-layers two: give a whole number"),
    ],
)
def test_a_suite_is_refused_what_a_flag_is_refused(
    setting: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^here: .*{message}"):
        with_changes(demo(), {setting: value}, "here")


def test_a_suite_says_what_a_flag_says() -> None:
    changes = {
        "data.split_seed": "none",
        "model.moe_layers": "none",
        "optim.compare_dense": "no",
        "optim.compare_null": False,
        "optim.lb_coef": 1,
        "run_name": "--odd",
    }
    found = with_changes(replace(demo(), data=replace(demo().data, split_seed=3)), changes, "here")
    assert (found.data.split_seed, found.model.moe_layers, found.run_name) == (None, (), "--odd")
    assert (found.optim.compare_dense, found.optim.compare_null) == (False, False)
    assert isinstance(found.optim.lb_coef, float)


def test_the_estimate_is_steps_times_measured_time(tmp_path: Path) -> None:
    runs = plan_runs(load_suite(str(TINY)), tmp_path)
    found = estimate(runs, runs[1:], jobs=2, threads=1, seconds=0.1)
    costs = {cost.variant: cost for cost in found.variants}
    assert costs["base"].runs == 1
    assert costs["base"].missing == 0
    assert costs["moe"].tokens == costs["moe"].steps * 2 * 32
    assert costs["moe"].step_seconds > 0
    # as many evaluations as the trainer makes: at 0, 3 and 6, of 4 blocks in each of 3 domains
    evaluated = 3 * 4 * 3 * 32 / 64 / 3
    assert costs["moe"].run_seconds == pytest.approx(costs["moe"].step_seconds * (6 + evaluated))
    missing = sum(c.run_seconds * c.missing for c in found.variants)
    assert found.hours == pytest.approx(missing / 2 / 3600)


def test_the_estimate_is_of_the_base_that_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bases of other widths, the suite's own among them before they are trained, cost what their
    widths cost, also in the steps of equal FLOPs; one that nobody has is refused."""
    folder = tmp_path / "qwen3"
    llama_models.make_dense("qwen3").save_pretrained(folder)
    other_base = {"model.base": str(tmp_path / "gpt2")}
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=2)).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "matched.toml").write_text(
        f"""
question = "?"
preset = "moe-main"
seeds = [0]
[changes]
"model.base" = "{folder}"
"model.moe_layers" = [1]
"optim.max_steps" = 50
[[variants]]
name = "top1"
[[variants]]
name = "top4"
changes = {{ "model.top_k" = 4 }}
flops_of = "top1"
"""
    )
    suite = load_suite(str(tmp_path / "matched.toml"))
    own = variant_configs(suite, {})
    shared = replace(suite, base={"model.moe_layers": []})
    runs = plan_runs(shared, tmp_path / "runs")
    flops = {cost.variant: cost.flops for cost in estimate(runs, [], jobs=1, threads=1).variants}
    for name in ("top1", "top4"):
        assert flops[name] == training_flops(own[name])
    other = variant_configs(suite, other_base)
    assert other["top4"].optim.max_steps != own["top4"].optim.max_steps
    monkeypatch.setattr("moe_emergence.suite.work.execute", lambda runs, execution: ([], 0))
    flags = ["--out", str(tmp_path / "runs"), "--base", other_base["model.base"]]
    command.main(["run", str(tmp_path / "matched.toml"), *flags])
    described = json.loads((tmp_path / "runs/suite.json").read_text())["variants"][1]["changes"]
    assert described["optim.max_steps"] == other["top4"].optim.max_steps

    def unreachable(repo: str) -> None:
        raise OSError(f"no answer about {repo}")

    monkeypatch.setattr(loading, "check_model_reachable", unreachable)
    with pytest.raises(ValueError, match=r"--base nobody: .*no answer about nobody"):
        variant_configs(suite, {"model.base": "nobody"})


def test_bases_of_other_shapes_are_timed_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for width in (16, 32):
        folder = tmp_path / str(width)
        GPT2Config(n_embd=width, n_head=2, n_layer=2).save_pretrained(folder)
        changed = with_changes(demo(), {"model.base": str(folder)}, "here")
        runs.append(PlannedRun(str(width), 0, changed, False))

    def width_of(config: RunConfig, seconds: float) -> float:
        return float(base_config(config).hidden_size)

    monkeypatch.setattr("moe_emergence.experiments.estimate.time_step", width_of)
    found = estimate(runs, runs, jobs=1, threads=1)
    assert [cost.step_seconds for cost in found.variants] == [16.0, 32.0]


def test_a_plan_over_budget_is_refused() -> None:
    cost = VariantCost("moe", 5, 5, 300, 300_000, 1e12, 0.5, 720.0)
    found = Estimate("CPU", 1, (cost,))
    refuse_over_budget(found, 2.0, 2.0)
    with pytest.raises(
        ValueError, match=r"--budget 1\.5: the runs to do cost 2\.00 \(1\.00 h at 2\)"
    ):
        refuse_over_budget(found, 2.0, 1.5)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(estimate_table(found, 2.0))
    text = console.export_text()
    assert "1.00 CPU-hours on CPU, 1 at a time: 2.00 at 2 an hour" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["walk"], "choose from plan, run, report"),
        (["plan", "demo", "--budget", "3"], "--price-per-hour"),
        (["plan", "demo", "--only", "nothing"], "--only nothing: choose from dense"),
        (["plan", "demo", "--base", "gpt2"], "--base gpt2: demo pretrains its own bases"),
        (["run", "demo", "--jobs", "0"], "--jobs 0"),
        (["report", "demo", "--out", "/nowhere"], "suite.json"),
    ],
)
def test_wrong_flags_are_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        command.main(argv)
    assert message in str(caught.value)

"""Presets and configuration: each ablation differs in what it says, and nothing else."""

import json
import logging
from dataclasses import is_dataclass, replace
from typing import Any

import pytest
from conftest import flags_of as every_flag
from hypothesis import given
from hypothesis import strategies as st

from moe_emergence.command import parse
from moe_emergence.config import ModelConfig, OptimConfig, RunConfig
from moe_emergence.flags import ELSEWHERE, flags_of
from moe_emergence.generate import GenerateConfig
from moe_emergence.presets import PRESETS, get_preset
from moe_emergence.settings import from_dict, to_dict


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        found |= (
            leaves(value, f"{prefix}{name}.") if is_dataclass(value) else {prefix + name: value}
        )
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_preset_differs_from_its_base_in_exactly_the_named_fields(name: str) -> None:
    preset = PRESETS[name]
    if preset.base is None:
        assert preset.changes == ()
        return
    own, base = leaves(preset.make()), leaves(get_preset(preset.base))
    changed = {field for field, value in own.items() if base[field] != value}
    assert changed == {*preset.changes, "preset", "run_name"}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_json_and_the_command_line(name: str) -> None:
    config = get_preset(name)
    assert config.preset == name
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert parse(RunConfig, every_flag(config), "train", default=get_preset("demo")) == config
    assert parse(RunConfig, [], "train", default=config) == config


SPELLINGS: dict[str, tuple[str, bool | tuple[int, ...] | str | int | None]] = {
    "--compare-dense": ("optim.compare_dense", True),
    "--no-compare-dense": ("optim.compare_dense", False),
    "--compare-dense yes": ("optim.compare_dense", True),
    "--compare-dense no": ("optim.compare_dense", False),
    "--compare_dense=no": ("optim.compare_dense", False),
    "--moe-layers none": ("model.moe_layers", ()),
    "--moe-layers": ("model.moe_layers", ()),
    "--moe-layers 1 3": ("model.moe_layers", (1, 3)),
    "--moe-layers 1,3": ("model.moe_layers", (1, 3)),
    "--moe-layers=1,3": ("model.moe_layers", (1, 3)),
    "--resume none": ("resume", None),
    "--resume auto": ("resume", "auto"),
    "--stop-after none": ("stop_after", None),
    "--stop-after 7": ("stop_after", 7),
    "--hub-revision none": ("data.hub_revision", ()),
    "--hub-revision code=main math=a,b": ("data.hub_revision", ("code=main", "math=a,b")),
}


@pytest.mark.parametrize("line", SPELLINGS)
@pytest.mark.parametrize("after", ["", "--seed 5"])
def test_every_spelling_of_a_flag(line: str, after: str) -> None:
    name, expected = SPELLINGS[line]
    words = f"{line} {after}".split()
    found = leaves(parse(RunConfig, words, "train", default=get_preset("demo")))
    assert found[name] == expected
    assert found["seed"] == (5 if after else 42)
    start = leaves(get_preset("demo"))
    assert {field for field in start if found[field] != start[field]} <= {name, "seed"}


SWITCHES = [name for name, hint in flags_of(RunConfig).items() if hint is bool]


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_is_said_in_four_ways(name: str) -> None:
    def read(*words: str) -> RunConfig:
        return parse(RunConfig, words, "train", default=get_preset("demo"))

    assert read(name) == read(name, "yes") != read(name, "no")
    assert read(name, "no") == read(name.replace("--", "--no-", 1))


@pytest.mark.parametrize(("called", "meant"), ELSEWHERE.items())
def test_other_names_are_those_of_no_flag_and_lead_to_one(called: str, meant: str) -> None:
    known = [flags_of(RunConfig), flags_of(GenerateConfig)]
    having = [flags for flags in known if meant in flags]
    assert having
    assert not any(called in flags for flags in having)
    for cls in (RunConfig, GenerateConfig):
        if meant in flags_of(cls):
            with pytest.raises(ValueError, match=f"^{called}: .*; did you mean {meant}\\?"):
                parse(cls, [called, "1"], "train")


def test_predecessors_numbers() -> None:
    main = get_preset("moe-main")
    assert (main.data.block_size, main.optim.batch_size, main.optim.grad_accum_steps) == (512, 2, 4)
    assert (main.optim.learning_rate, main.optim.weight_decay) == (5e-5, 0.01)
    assert (main.optim.warmup_fraction, main.optim.max_grad_norm) == (0.1, 1.0)
    assert (main.optim.lb_coef, main.optim.z_coef, main.optim.noise_std) == (0.01, 0.001, 0.1)
    assert main.optim.noise_anneal_fraction == 0.25
    assert (main.data.size_mb, main.seed, main.optim.max_steps) == (10.0, 42, 10_000)
    assert (main.model.moe_layers, main.model.num_experts) == ((8, 9, 10, 11), 8)
    assert get_preset("dense").optim.max_steps == 5_000
    assert get_preset("no-lb").optim.lb_coef == 0.0
    assert get_preset("top2").model.top_k == 2
    assert get_preset("shakedown").optim.max_steps == 100


@given(
    values=st.fixed_dictionaries(
        {
            "max_steps": st.integers(1, 10**6),
            "learning_rate": st.floats(1e-8, 1.0),
            "lb_coef": st.floats(0, 10),
            "balance_scope": st.sampled_from(["global", "micro"]),
            "compare_dense": st.booleans(),
        }
    ),
    layers=st.lists(st.integers(0, 11), unique=True).map(tuple),
)
def test_any_configuration_survives_json(values: dict[str, Any], layers: tuple[int, ...]) -> None:
    config = RunConfig(
        preset="demo",
        run_name="x",
        model=ModelConfig(moe_layers=layers),
        optim=OptimConfig(**values),
    )
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_unknown_and_missing_names_are_refused() -> None:
    good = to_dict(get_preset("demo"))
    with pytest.raises(ValueError, match="no field colour"):
        from_dict(RunConfig, {**good, "colour": "red"})
    with pytest.raises(ValueError, match="lacks run_name"):
        from_dict(RunConfig, {k: v for k, v in good.items() if k != "run_name"})


def test_a_setting_newer_than_the_file_has_its_default_and_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved = replace(get_preset("demo"), model=ModelConfig(moe_layers=(2,), pool_size=2))
    old = json.loads(json.dumps(to_dict(saved)))
    del old["model"]["pool_size"], old["seed"]
    with caplog.at_level(logging.INFO):
        found = from_dict(RunConfig, old)
    assert found == replace(saved, model=replace(saved.model, pool_size=0), seed=42)
    assert "there was pool_size" in caplog.text
    assert "there was seed" in caplog.text


def test_configurations_are_frozen() -> None:
    with pytest.raises(AttributeError):
        get_preset("demo").seed = 1  # type: ignore[misc]
    assert replace(get_preset("demo"), seed=1).seed == 1

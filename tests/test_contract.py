"""docs/contract.md says what the code does."""

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from moe_emergence.command import parse
from moe_emergence.config import (
    SHIPPED,
    DataConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    RunConfig,
)
from moe_emergence.data.split import eval_count
from moe_emergence.flags import flag
from moe_emergence.presets import PRESETS, get_preset
from moe_emergence.run_folder import RunFolder, read_metrics
from moe_emergence.training.experiment import run_experiment
from moe_emergence.training.trainer import RunSummary
from moe_emergence.words import written

CONTRACT = (REPOSITORY / "docs" / "contract.md").read_text("utf-8")
GROUPS = (ModelConfig, DataConfig, OptimConfig, MonitorConfig)


def shown(value: Any) -> str:
    """A value as the contract writes it."""
    return " ".join(written(value))


def section(title: str) -> str:
    return re.split(r"\n#+ ", CONTRACT.split(f"# {title}\n")[1])[0]


def table(text: str) -> list[list[str]]:
    """The cells of every body row of the tables in `text`."""
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    return [row for row in cells if not set(row[0]) <= set("-|")][1:]


def all_fields() -> dict[str, dataclasses.Field[Any]]:
    own = [f for f in dataclasses.fields(RunConfig) if not dataclasses.is_dataclass(f.type)]
    return {f.name: f for f in own} | {f.name: f for g in GROUPS for f in dataclasses.fields(g)}


def test_every_flag_has_its_default_in_the_contract() -> None:
    rows: dict[str, str] = {}
    for title in ("Run", "Model", "Data", "Optimisation", "Monitoring"):
        for name, default, _ in table(section(title)):
            rows[name.strip("`")] = default
    expected = {
        flag(name): "the preset's" if field.default is dataclasses.MISSING else shown(field.default)
        for name, field in all_fields().items()
    }
    assert rows == expected


def test_presets_differ_from_the_defaults_as_the_contract_says() -> None:
    rows = {name.strip("`"): changes for name, changes in table(section("Presets"))}
    assert list(rows) == list(PRESETS)
    for name, changes in rows.items():
        preset = get_preset(name)
        differing = set()
        for group in ("model", "data", "optim", "monitor"):
            config = getattr(preset, group)
            for field in dataclasses.fields(config):
                value = getattr(config, field.name)
                if value != field.default:
                    differing.add(f"{flag(field.name)} {shown(value)}")
        assert set(re.findall(r"`([^`]+)`", changes)) == differing, name


def test_what_the_contract_writes_can_be_typed() -> None:
    """Every default, and all that a preset changes, as the tables have it."""
    typed = []
    for title in ("Run", "Model", "Data", "Optimisation", "Monitoring"):
        for name, default, _ in table(section(title)):
            typed += [] if default == "the preset's" else [name.strip("`"), *default.split()]
    plain = RunConfig(preset="demo", run_name="demo")
    assert parse(RunConfig, typed, "train", default=get_preset("demo")) == plain
    for name, changes in table(section("Presets")):
        name = name.strip("`")
        words = " ".join(re.findall(r"`([^`]+)`", changes)).split()
        plain = RunConfig(preset=name, run_name=name)
        assert parse(RunConfig, words, "train", default=plain) == get_preset(name)


def test_split_policy_is_the_codes() -> None:
    rows = table(section("Policies"))
    assert len(rows) >= 8
    for n, expected in rows:
        assert eval_count(int(n)) == int(expected)


def documented_keys(title: str) -> set[str]:
    return {key for row in table(section(title)) for key in re.findall(r"`([^`]+)`", row[0])}


def generic(key: str) -> str:
    key = re.sub(r"layer_\d+", "layer_N", key)
    key = re.sub(rf"lm_loss_({'|'.join(SHIPPED)})", "lm_loss_DOMAIN", key)
    return re.sub(r"expert_\d+", "expert_E", key)


def test_metrics_and_files_are_the_documented_ones(tiny_config: RunConfig) -> None:
    """A whole experiment writes every documented key and file, and no other."""
    config = replace(
        tiny_config,
        optim=replace(tiny_config.optim, variance_coef=0.1, compare_dense=True, compare_null=True),
        monitor=replace(tiny_config.monitor, track="tensorboard"),
    )
    run_experiment(config)
    run = RunFolder(Path(config.output_dir) / config.run_name)
    keys = {key for row in read_metrics(run.metrics) for key in row} - {"step"}
    assert {generic(key) for key in keys} == documented_keys("Metrics")
    assert {f"eval/lm_loss_{domain}" for domain in SHIPPED} <= keys
    names = {name.split("/")[0] for name in documented_keys("The run folder")}
    written = {path.name for path in run.root.iterdir()}
    # the figure and its table come from the command, see test_training_command.py
    assert written | {"expert_domain.png", "expert_domain.csv"} == names
    summary = json.loads(run.summary.read_text())
    assert list(summary) == [field.name for field in dataclasses.fields(RunSummary)]
    for name in summary:
        assert f"`{name}`" in section("The run folder")
    saved = json.loads((run.final_model / "config.json").read_text())
    for coefficient in ("lb_coef", "z_coef", "variance_coef"):
        assert saved[coefficient] == getattr(config.optim, coefficient)


@pytest.mark.parametrize("status", ["completed", "collapsed", "interrupted", "failed"])
def test_every_status_is_documented(status: str) -> None:
    assert f"`{status}`" in section("The run folder")

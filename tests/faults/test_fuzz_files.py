"""Files of runs, models, suites and tokenizers with anything in them are read or refused."""

import contextlib
import io
import json
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny
from hypothesis import event, given
from hypothesis import strategies as st
from mutated import changed, is_sentence, json_files, often, spoilt
from suite_folders import PLANS, write_suite

from moe_emergence import generate
from moe_emergence.analysis.loading import Placement
from moe_emergence.analysis.routing_record import read_routing
from moe_emergence.analysis.sources import TextChoice, open_source, read_text
from moe_emergence.analysis.summary import print_comparison
from moe_emergence.analysis.training_curves import training_tables
from moe_emergence.analyze.describe import made_by
from moe_emergence.config import ModelConfig, RunConfig
from moe_emergence.data import prepare_data
from moe_emergence.data.prepared import save_prepared
from moe_emergence.data.tokenizer import encode_documents, folder_tokenizer
from moe_emergence.errors import exit_code
from moe_emergence.experiments.collect import collect, final_losses
from moe_emergence.experiments.description import read_suite
from moe_emergence.experiments.suite_file import SUITES, load_suite
from moe_emergence.experiments.variants import read_base, read_variants
from moe_emergence.models.loading import load_dense_model
from moe_emergence.moe.tuning import TuningEntry, TuningKey, TuningTable, load_table, save_table
from moe_emergence.training.experiment import run_experiment

Folder = Callable[[], Path]


def answered(work: Callable[[], Any], name: str | None = None) -> None:
    """Do the work as a command would; what fails ends in one line that names a file or a flag, or
    what has this `name`."""

    def main(argv: list[str]) -> int:
        work()
        return 0

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = exit_code(main, [])
    event(f"exit code {code}")
    assert code in (0, 1, 2)
    lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    assert len(lines) == (code != 0), said.getvalue()
    for line in lines:
        assert is_sentence(line) or (name is not None and name in line), line
        assert "(--debug shows where)" not in line, line


@pytest.fixture
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return lambda: tmp_path_factory.mktemp("fuzz") / "copy"


def damage(data: st.DataObject, path: Path) -> None:
    """Change one file, by its structure where it has one."""
    content = path.read_bytes()
    if path.suffix == ".json":
        content = data.draw(json_files(json.loads(content)))
    elif path.suffix == ".jsonl":
        rows = data.draw(changed([json.loads(line) for line in content.splitlines()], most=3))
        text = "".join(json.dumps(row) + "\n" for row in rows) if isinstance(rows, list) else "x\n"
        content = text.encode("utf-8", "surrogatepass")
        content = data.draw(spoilt(content)) if data.draw(st.integers(0, 3)) == 0 else content
    else:
        content = data.draw(spoilt(content))
    path.write_bytes(content)


def damaged_copy(data: st.DataObject, whole: Path, to: Path, names: list[str]) -> Path:
    shutil.copytree(whole, to)
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        damage(data, to / name)
    return to


@pytest.fixture(scope="module")
def config(
    data_folder: Path, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    """Of a run that has ended, with everything that a run leaves behind."""
    found = tiny(data_folder, cache_folder, tmp_path_factory.mktemp("whole"))
    run_experiment(found)
    return found


@pytest.fixture(scope="module")
def run(config: RunConfig) -> Path:
    return Path(config.output_dir) / config.run_name


RUN_FILES = ["config.json", "data_manifest.json", "metrics.jsonl", "run_summary.json"]


@often(5, 200)
@given(data=st.data())
def test_fuzz_runs_to_resume(
    data: st.DataObject, run: Path, config: RunConfig, fresh: Folder
) -> None:
    """`train --resume auto` on a run whose files are damaged."""
    where = fresh()
    folder = where / "tiny"
    checkpoint = "checkpoints/step-000006/checkpoint.json"
    damaged_copy(data, run, folder, [*RUN_FILES, checkpoint, "dense-base/run_summary.json"])

    def resume() -> None:
        result = run_experiment(replace(config, output_dir=str(where), resume="auto"))
        runs = {stage.role: stage.run for stage in result.stages}
        print_comparison(runs, result.status, folder)

    answered(resume)


@often(8, 200)
@given(data=st.data())
def test_fuzz_runs_to_analyse(
    data: st.DataObject, run: Path, config: RunConfig, fresh: Folder
) -> None:
    """What `analyze` reads of a run before it routes anything."""
    model = [f"final-model/{name}" for name in MODEL_FILES]
    folder = damaged_copy(data, run, fresh(), [*RUN_FILES, "environment.json", *model])

    def analyse() -> None:
        source = open_source(str(folder), "one", Placement())
        made_by(source)
        read_text(source, TextChoice(cache_dir=config.data.cache_dir))
        for metrics in [source.metrics] if source.metrics else []:
            training_tables(metrics)

    answered(analyse)


MODEL_FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
               "generation_config.json"]  # fmt: skip


@often(8, 300)
@given(data=st.data())
def test_fuzz_models_to_generate_with(data: st.DataObject, run: Path, fresh: Folder) -> None:
    folder = damaged_copy(data, run / "final-model", fresh(), MODEL_FILES)
    flags = ["--checkpoint", str(folder), "--prompt", "and the", "--max-new-tokens", "2"]
    answered(lambda: generate.main([*flags, "--show-routing"]))


@often(8, 300)
@given(data=st.data())
def test_fuzz_bases(data: st.DataObject, run: Path, fresh: Folder, cache_folder: Path) -> None:
    """`--base` a dense model whose files, or whose tokenizer's, are damaged."""
    folder = damaged_copy(data, run / "dense-base" / "final-model", fresh(), MODEL_FILES)

    def load() -> None:
        tokenizer = folder_tokenizer(str(folder))
        encode_documents(tokenizer, ["and the", "", "é 中"], "encoding")
        config = ModelConfig(base=str(folder), moe_layers=(1,))
        load_dense_model(config, tokenizer, 8, str(cache_folder))

    answered(load)


@often(15, 300)
@given(data=st.data())
def test_fuzz_prepared_data(
    data: st.DataObject, prepared: Path, config: RunConfig, fresh: Folder
) -> None:
    names = ["data_manifest.json", "blocks.safetensors", "tokenizer/tokenizer.json"]
    folder = damaged_copy(data, prepared, fresh(), names)

    def prepare() -> None:
        found = prepare_data(replace(config.data, data=str(folder)), config.seed)
        for blocks in (*found.train_blocks.values(), *found.eval_blocks.values()):
            assert blocks.shape[1:] == (config.data.block_size,)
            assert 0 <= int(blocks.min()) <= int(blocks.max()) < len(found.tokenizer)
        assert found.token_classes.keys() == found.train_blocks.keys()

    answered(prepare)


@pytest.fixture(scope="module")
def prepared(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "blocks"
    save_prepared(prepare_data(config.data, config.seed), folder)
    return folder


def toml(value: Any) -> str:
    """A value as TOML writes it; what TOML lacks is left as JSON, which it refuses."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


@often(30, 500)
@given(data=st.data())
def test_fuzz_suites(data: st.DataObject, fresh: Folder) -> None:
    text = data.draw(st.sampled_from(sorted(SUITES.glob("*.toml")))).read_text("utf-8")
    values = data.draw(changed(tomllib.loads(text), most=3))
    lines = values.items() if isinstance(values, dict) else [("x", values)]
    content = "".join(f"{json.dumps(name)} = {toml(value)}\n" for name, value in lines)
    raw = content.encode("utf-8", "surrogatepass")
    raw = data.draw(spoilt(raw)) if data.draw(st.integers(0, 4)) == 0 else raw
    path = fresh().with_suffix(".toml")
    path.write_bytes(raw)

    def read() -> None:
        suite = load_suite(str(path))
        read_base(suite, {})
        read_variants(suite, {})

    answered(read, f"{path.stem}: ")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite") / "suite", PLANS[:2], (0, 1))


@often(20, 300)
@given(data=st.data())
def test_fuzz_suite_folders(data: st.DataObject, suite: Path, fresh: Folder) -> None:
    """What `suite report` reads of the runs, one of which is damaged."""
    names = ["suite.json", *(f"moe/seed-0/{name}" for name in [*RUN_FILES, "environment.json"])]
    folder = damaged_copy(data, suite, fresh(), names)

    def read() -> None:
        records = collect(read_suite(folder))
        final_losses(records)
        assert records.domains

    answered(read)


@often(30, 300)
@given(data=st.data())
def test_fuzz_routing_records(data: st.DataObject, suite: Path, fresh: Folder) -> None:
    path = fresh().with_suffix(".npz")
    path.write_bytes(data.draw(spoilt((suite / "moe/seed-0/routing.npz").read_bytes())))
    answered(lambda: read_routing(path))


KEY = TuningKey("float32", 16, 64, 4, 1, "gelu_tanh", 128)


@often(30, 300)
@given(data=st.data())
def test_fuzz_tuning_tables(data: st.DataObject, fresh: Folder) -> None:
    """A table that is no table is passed over; one that is read can be used."""
    path = fresh().with_suffix(".json")
    save_table(TuningTable({KEY: TuningEntry("fused", "", {"fused": 1.0})}), path)
    damage(data, path)
    table = load_table(path)
    assert all(isinstance(entry.dispatch, str) for entry in table.entries.values())

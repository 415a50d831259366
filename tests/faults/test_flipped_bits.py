"""A bit that flipped, and files cut off, lost or added: noticed, and by name."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny
from equal_runs import assert_same_run
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_emergence.config import RunConfig
from moe_emergence.models.loading import load_trained_model
from moe_emergence.run_folder import RunFolder
from moe_emergence.training.checkpoint import load_checkpoint
from moe_emergence.training.experiment import run_experiment

FILES = (
    *("README.md", "checkpoint.json", "config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "trainer.pt"),
)


def flip(path: Path, place: int) -> None:
    """Flip a bit, the file being a row of bits."""
    content = bytearray(path.read_bytes())
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def refused(call: Callable[[], object]) -> str:
    """The one line with which a call is refused; empty where it is not."""
    try:
        call()
    except ValueError as error:
        line = str(error)
    else:
        return ""
    assert "\n" not in line
    return line


def bits(path: Path) -> int:
    return 8 * path.stat().st_size


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, data_folder: Path, cache_folder: Path
) -> tuple[RunConfig, RunFolder]:
    torch.set_num_threads(1)
    config = tiny(data_folder, cache_folder, tmp_path_factory.mktemp("whole"))
    run_experiment(config)
    return config, RunFolder(Path(config.output_dir) / "tiny")


@pytest.fixture(scope="module")
def copied(whole: tuple[RunConfig, RunFolder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copied") / "step-000003"
    shutil.copytree(whole[1].checkpoint(3), folder)
    return folder


def test_these_are_all_the_files(copied: Path) -> None:
    assert sorted(path.name for path in copied.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_bit_of_any_file_is_noticed(copied: Path, name: str) -> None:
    path = copied / name

    @settings(deadline=None)
    @given(st.integers(0, bits(path) - 1))
    def one(place: int) -> None:
        flip(path, place)
        try:
            refusal = refused(lambda: load_checkpoint(copied))
        finally:
            flip(path, place)
        assert "step-000003" in refusal
        assert name in refusal

    one()
    assert load_checkpoint(copied).step == 3


@pytest.mark.parametrize("name", FILES)
def test_auto_says_so_and_goes_on_from_the_newest_whole_one(
    whole: tuple[RunConfig, RunFolder], tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    config, run = whole
    damaged = RunFolder(tmp_path / "runs" / "tiny")
    shutil.copytree(run.root, damaged.root)
    damaged.summary.unlink()
    path = damaged.checkpoint(6) / name
    flip(path, random.Random(name).randrange(bits(path)))
    with caplog.at_level("WARNING", "moe_emergence"):
        run_experiment(replace(config, output_dir=str(tmp_path / "runs"), resume="auto"))
    assert any("step-000006" in r.message and name in r.message for r in caplog.records)
    assert_same_run(run, damaged)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "{name} is missing"),
    "empty": (lambda path: path.write_bytes(b""), "{name} is not what was written"),
    "cut off": (
        lambda path: path.write_bytes(path.read_bytes()[:-1]), "{name} is not what was written",
    ),
    "another beside it": (
        lambda path: path.with_name("adapter_config.json").write_text("{}"),
        r"adapter_config\.json was not written with the checkpoint",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in FILES if name != "checkpoint.json"])
@pytest.mark.parametrize(("damage", "says"), DAMAGE.values(), ids=DAMAGE.keys())
def test_files_that_are_not_those_written_are_refused(
    copied: Path, tmp_path: Path, name: str, damage: Callable[[Path], object], says: str
) -> None:
    folder = tmp_path / "step-000003"
    shutil.copytree(copied, folder)
    damage(folder / name)
    with pytest.raises(ValueError, match=says.format(name=name)):
        load_checkpoint(folder)


def test_hidden_files_and_an_analysis_do_no_harm(copied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-000003"
    shutil.copytree(copied, folder)
    (folder / "analysis").mkdir()
    (folder / ".DS_Store").write_text("")
    assert load_checkpoint(folder).step == 3


def test_checkpoints_from_before_the_digest_are_read(copied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-000003"
    shutil.copytree(copied, folder)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    del manifest["sha256"]
    (folder / "checkpoint.json").write_text(json.dumps(manifest, indent=2))
    assert load_checkpoint(folder).progress == load_checkpoint(copied).progress


@pytest.mark.parametrize("damage", ["header", "cut off", "length", "empty"])
def test_damaged_weights_are_refused_in_one_line(
    whole: tuple[RunConfig, RunFolder], tmp_path: Path, damage: str
) -> None:
    config, run = whole
    folder = tmp_path / "model"
    shutil.copytree(run.root / "dense-base" / "final-model", folder)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    rng = random.Random(0)
    header = int.from_bytes(content[:8], "little")
    damages = {
        "header": [8 * 8 + rng.randrange(8 * header) for _ in range(10)],
        "length": rng.sample(range(64), 5),
    }
    for place in damages.get(damage, [0]):
        path.write_bytes(content)
        if damage in damages:
            flip(path, place)
        else:
            path.write_bytes(content[: rng.randrange(len(content)) if damage == "cut off" else 0])
        based = replace(
            config, run_name="based", model=replace(config.model, base=str(folder)),
            output_dir=str(tmp_path / "runs"), optim=replace(config.optim, pretrain_steps=0),
        )  # fmt: skip
        says = refused(lambda: load_trained_model(folder))
        # a name in the file's own description, or JSON that means the same
        assert says or damage == "header"
        if says:
            assert str(folder) in says
            assert f"--base {folder}" in refused(lambda: run_experiment(based))  # noqa: B023
            shutil.rmtree(tmp_path / "runs", ignore_errors=True)

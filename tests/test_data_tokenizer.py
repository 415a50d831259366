import copy
import json
import logging
import re
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from moe_emergence.config import DataConfig
from moe_emergence.data.tokenizer import (
    END_OF_TEXT,
    GPT2_REPO,
    encode_documents,
    hash_tokenizer,
    load_tokenizer,
    train_bpe,
    trained_tokenizer,
)

TEXTS = [f"def area_{i}(width, height):\n    return width * height + {i}\n" for i in range(80)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return trained_tokenizer(TEXTS, 320, str(tmp_path_factory.mktemp("cache")))


def test_trained_tokenizer_has_the_vocabulary_and_end_of_text_asked_for(tokenizer) -> None:
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert len(tokenizer) == 320
    assert tokenizer.eos_token == tokenizer.bos_token == END_OF_TEXT
    assert tokenizer.get_vocab()[END_OF_TEXT] == tokenizer.eos_token_id
    assert len(tokenizer(TEXTS[0])["input_ids"]) < len(TEXTS[0]) / 2  # it learned merges


@given(st.text() | st.text(alphabet=" .,!?'n t\n\u0301😀é<|endoftext>"))
def test_decoding_gives_the_text_back(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(encode_documents(tokenizer, [text], "test")[0]) == text


@pytest.mark.parametrize("text", ["", " ", "I do n't , know .", END_OF_TEXT, "\x00\r\n\u2028"])
def test_decoding_gives_awkward_texts_back(tokenizer, text: str) -> None:
    assert tokenizer.decode(encode_documents(tokenizer, [text], "test")[0]) == text


def test_end_of_text_written_in_a_document_is_text(tokenizer) -> None:
    (ids,) = encode_documents(tokenizer, [f"a {END_OF_TEXT} b"], "test")
    assert tokenizer.eos_token_id not in ids


def test_a_smaller_vocabulary_than_bytes_and_end_of_text_is_refused_before() -> None:
    assert len(train_bpe(TEXTS, 257)) == 257
    with pytest.raises(ValueError, match="--vocab-size 256"):
        DataConfig(tokenizer="train", vocab_size=256)


def test_training_is_deterministic_over_processes(tokenizer, tmp_path: Path) -> None:
    code = (
        "import sys; from moe_emergence.data.tokenizer import trained_tokenizer, hash_tokenizer\n"
        "texts = [f'def area_{i}(width, height):\\n    return width * height + {i}\\n' "
        "for i in range(80)]\n"
        "sys.stdout.write(hash_tokenizer(trained_tokenizer(texts, 320, sys.argv[1])))"
    )
    path = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=path
    )
    assert result.stdout == hash_tokenizer(tokenizer), result.stderr


def test_training_is_cached_by_texts_and_size(tmp_path: Path) -> None:
    first = trained_tokenizer(TEXTS, 300, str(tmp_path))
    (folder,) = (tmp_path / "tokenizers").iterdir()
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    assert hash_tokenizer(trained_tokenizer(TEXTS, 300, str(tmp_path))) == hash_tokenizer(first)
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before
    trained_tokenizer(TEXTS, 301, str(tmp_path))
    trained_tokenizer(TEXTS[1:], 300, str(tmp_path))
    trained_tokenizer(["".join(TEXTS[:2]), *TEXTS[2:]], 300, str(tmp_path))
    assert len(list((tmp_path / "tokenizers").iterdir())) == 4


def test_racing_for_the_cache_leaves_one_whole_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: trained_tokenizer(TEXTS, 290, str(tmp_path)), range(4)))
    assert len({hash_tokenizer(t) for t in made}) == 1
    assert len(list((tmp_path / "tokenizers").iterdir())) == 1


def test_saving_and_loading_keeps_everything(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(DataConfig(tokenizer=str(tmp_path)), [])
    assert hash_tokenizer(loaded) == hash_tokenizer(tokenizer)
    assert loaded.eos_token_id == loaded.bos_token_id == tokenizer.eos_token_id
    text = "I do n't , know .  " + TEXTS[0]
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_the_hash_sees_vocabulary_and_end_of_text(tokenizer, tmp_path: Path) -> None:
    other = train_bpe(TEXTS, 320)
    assert hash_tokenizer(other) == hash_tokenizer(tokenizer)
    other.eos_token = "a"
    assert hash_tokenizer(other) != hash_tokenizer(tokenizer)
    assert hash_tokenizer(train_bpe(TEXTS, 319)) != hash_tokenizer(tokenizer)


def test_the_hash_sees_what_the_vocabulary_does_not(tokenizer) -> None:
    """The same entries, and other tokens for the same text."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    changes = {
        "merges": backend["model"]["merges"][::-1],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {**backend["pre_tokenizer"], "add_prefix_space": True},
    }
    hashes = {hash_tokenizer(tokenizer)}
    for name, value in changes.items():
        other = copy.deepcopy(backend)
        (other["model"] if name == "merges" else other)[name] = value
        made = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(other)), eos_token=tokenizer.eos_token
        )
        assert made.get_vocab() == tokenizer.get_vocab()
        hashes.add(hash_tokenizer(made))
    assert len(hashes) == 4
    with_padding = copy.deepcopy(tokenizer)
    with_padding.backend_tokenizer.enable_truncation(5)
    assert hash_tokenizer(with_padding) in hashes


def test_long_documents_are_tokenised_without_a_warning(
    tmp_path: Path, caplog, capfd, monkeypatch
) -> None:
    made = train_bpe(TEXTS, 300)
    made.model_max_length = 8
    made.save_pretrained(tmp_path)
    loaded = load_tokenizer(DataConfig(tokenizer=str(tmp_path)), [])
    assert loaded.model_max_length == 8
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to caplog
    with warnings.catch_warnings(), caplog.at_level("DEBUG"):
        warnings.simplefilter("error")
        lists = encode_documents(loaded, [text * 9 for text in TEXTS], "test")
    assert all(len(ids) > 8 for ids in lists)
    assert "longer than" not in caplog.text + "".join(capfd.readouterr())


def write_nothing(folder: Path) -> None:
    pass


def write_configuration_alone(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}'
    )


def write_damaged(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{nope")


def write_other_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"a": 1}')


def write_without_end_of_text(folder: Path) -> None:
    backend = train_bpe(TEXTS, 300).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_nothing, "no tokenizer could be read"),
        (write_configuration_alone, "no vocabulary"),
        (write_damaged, "no tokenizer could be read"),
        (write_other_json, "no tokenizer could be read"),
        (write_without_end_of_text, r"no end-of-text \(eos\) token"),
    ],
)
def test_a_bad_folder_is_refused_in_one_line(write, message, tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        load_tokenizer(DataConfig(tokenizer=str(tmp_path)), [])
    assert str(raised.value).startswith(f"--tokenizer {tmp_path}: ")
    assert "\n" not in str(raised.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'^--tokenizer .*: no such folder; give "gpt2", "train"'):
        load_tokenizer(DataConfig(tokenizer=str(tmp_path / "none")), [])


def test_a_damaged_cache_says_what_to_delete(tmp_path: Path) -> None:
    trained_tokenizer(TEXTS, 300, str(tmp_path))
    (folder,) = (tmp_path / "tokenizers").iterdir()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))} is damaged .*; delete it"):
        trained_tokenizer(TEXTS, 300, str(tmp_path))


def fill_hub_cache(cache: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """What a download of GPT-2's tokenizer leaves in the cache folder of the hub."""
    repo = cache / f"models--{GPT2_REPO.replace('/', '--')}"
    commit = "0" * 40
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    tokenizer.save_pretrained(snapshot)
    (snapshot / "config.json").write_text('{"model_type": "gpt2"}')
    return snapshot


def test_gpt2_comes_from_the_cache_without_the_hub(tokenizer, tmp_path: Path) -> None:
    fill_hub_cache(tmp_path / "hub", tokenizer)
    start = time.perf_counter()
    found = load_tokenizer(DataConfig(tokenizer="gpt2", cache_dir=str(tmp_path)), [])
    assert time.perf_counter() - start < 5  # no attempt at the network, which retries for longer
    assert hash_tokenizer(found) == hash_tokenizer(tokenizer)


def test_shared_gpt2_tokenizer_is_the_genuine_one() -> None:
    folder = Path(__file__).parents[2] / "shared" / "data" / "tokenizer_gpt2"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/tokenizer_gpt2, which is not here")
    found = load_tokenizer(DataConfig(tokenizer=str(folder)), [])
    assert len(found) == 50_257
    assert found.eos_token_id == 50_256
    assert encode_documents(found, ["Hello world"], "test") == [[15496, 995]]

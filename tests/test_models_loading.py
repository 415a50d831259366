"""What `--base` and `--checkpoint` accept, and how the rest is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

from moe_emergence.config import ModelConfig
from moe_emergence.models import upcycle
from moe_emergence.models.loading import load_dense_model, load_trained_model


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|endoftext|>")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(
    folder: Path, tokenizer: PreTrainedTokenizerFast, block_size: int = 8, layer: int = 1
) -> GPT2LMHeadModel:
    model = ModelConfig(base=str(folder), moe_layers=(layer,), dropout=0.25)
    return load_dense_model(model, tokenizer, block_size, str(folder / "cache"))


def test_a_base_is_loaded_with_the_dropout_asked_for(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = load(folder, tokenizer)
    assert model.config.resid_pdrop == 0.25
    assert model.transformer.h[0].mlp.dropout.p == 0.25


def test_a_base_that_does_not_fit_is_refused(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="--block-size 9: give at most 8"):
        load(folder, tokenizer, block_size=9)
    with pytest.raises(ValueError, match="--moe-layers"):
        load(folder, tokenizer, layer=2)
    tokenizer.add_tokens([f"t{i}" for i in range(30)])
    with pytest.raises(ValueError, match="--tokenizer with 32 entries"):
        load(folder, tokenizer)


def test_missing_weights_are_refused(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if "h.1.mlp." not in name}
    save_file(kept, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack \S*h\.1\.mlp"):
        load(folder, tokenizer)
    with pytest.raises(ValueError, match=r"lack \S*h\.1\.mlp"):
        load_trained_model(folder)


def test_torn_and_foreign_folders_are_refused_in_one_line(
    folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-50])
    for attempt in (lambda: load(folder, tokenizer), lambda: load_trained_model(folder)):
        with pytest.raises(ValueError, match="no model could be loaded") as refusal:
            attempt()
        assert "\n" not in str(refusal.value)
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_embd": 16}))
    with pytest.raises(ValueError, match="no model could be loaded"):
        load(folder, tokenizer)
    phi = PhiConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    PhiForCausalLM(phi).save_pretrained(tmp_path / "phi")
    with pytest.raises(ValueError, match=r"give a dense model of GPT-2, .* not a phi model"):
        load(tmp_path / "phi", tokenizer)
    with pytest.raises(ValueError, match=r"neither a dense model of GPT-2, .* nor its mixture"):
        load_trained_model(tmp_path / "phi")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no model could be loaded"):
        load(empty, tokenizer)


def test_a_mixture_is_no_dense_base(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    mixture = upcycle(load(folder, tokenizer), [1], 2, 1)
    mixture.save_pretrained(folder.parent / "mixture")
    with pytest.raises(ValueError, match="not a moe_gpt2 model"):
        load(folder.parent / "mixture", tokenizer)
    assert type(load_trained_model(folder.parent / "mixture")) is type(mixture)


def test_layers_are_kept_in_the_models_order() -> None:
    model = ModelConfig(moe_layers=(3, 1, 2))
    assert model.moe_layers == (1, 2, 3)
    assert replace(model, moe_layers=(2, 0)).moe_layers == (0, 2)


def test_loaded_weights_lie_where_new_ones_would(folder: Path) -> None:
    """In the memory of a safetensors file they lie at any address, and the last bit of a product
    depends on it: a resumed run differed from an uninterrupted one."""
    assert all(p.data_ptr() % 64 == 0 for p in load_trained_model(folder).parameters())

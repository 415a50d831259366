"""Models of any size: what they are loaded as, where to, and what is refused before it is tried."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from accelerate import cpu_offload
from routing_models import tiny_mixture

from moe_emergence.analysis import loading
from moe_emergence.analysis.ablation import block_losses
from moe_emergence.analysis.loading import Placement, load_model
from moe_emergence.analysis.routers import RouterReader
from moe_emergence.analyze import main
from moe_emergence.data.tokenizer import train_bpe


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small OLMoE, saved in bf16 as those on the hub are."""
    folder = tmp_path_factory.mktemp("olmoe")
    tiny_mixture("olmoe").bfloat16().save_pretrained(folder)
    train_bpe(["some words to train on"] * 20, 300).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "dtype"), [("auto", torch.bfloat16), ("fp32", torch.float32), ("fp16", torch.float16)]
)
def test_weights_are_what_was_saved_or_what_is_asked(saved: Path, name, dtype) -> None:
    model, _ = load_model(str(saved), Placement("cpu", name))
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert not model.training


def test_a_model_spread_over_what_there_is_computes_the_same(saved: Path) -> None:
    ids = torch.arange(64).view(2, 32)
    one, other = (load_model(str(saved), Placement(d, "fp32"))[0] for d in ("cpu", "spread"))
    assert torch.equal(one(input_ids=ids).logits, other(input_ids=ids.to(other.device)).logits)


def test_offloaded_weights_are_read_as_those_in_memory(saved: Path) -> None:
    ids = torch.arange(64).view(2, 32)
    model, _ = load_model(str(saved), Placement("cpu", "fp32"))
    with RouterReader(model).reading() as reader:
        plain = reader.read(ids)
    losses = block_losses(model, {"one": ids}, 2)
    away = cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(away.parameters()).is_meta
    with RouterReader(away).reading() as reader:
        for found, expected in zip(reader.read(ids), plain, strict=True):
            assert torch.equal(found.probs_TE, expected.probs_TE)
    np.testing.assert_array_equal(block_losses(away, {"one": ids}, 2)["one"], losses["one"])


def test_what_finds_no_room_is_refused_before_it_is_loaded(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "free_bytes", lambda placement: 10_000)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", None)
    message = r"SOURCE .*: 0\.0 billion weights, .*give --dtype bf16, --device spread"
    with pytest.raises(ValueError, match=message):
        load_model(str(saved), Placement())


def test_the_weights_are_counted_without_making_them(
    saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "GB", 1e3)
    with caplog.at_level(logging.INFO):
        model, _ = load_model(str(saved), Placement())
    count = sum(weight.numel() for weight in model.parameters())
    said = f"{count / 1e3:.1f} billion weights, {2 * count / 1e3:.1f} GB in torch.bfloat16"
    assert said in caplog.text
    assert loading.free_bytes(Placement()) <= psutil.virtual_memory().total


@pytest.mark.slow
def test_someone_elses_mixture_is_analysed_on_his_own_text_as_it_was_saved(
    saved: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("law", "medicine", "news", "poems", "recipes"):
        rows = (f'{{"body": "{name} {i} some words of {name} {i}"}}\n' for i in range(60))
        (texts / f"{name}.jsonl").write_text("".join(rows))
    flags = ("--data", str(texts), "--text-field", "body", "--device", "spread", "--max-tokens")
    few = ("2000", "--permutations", "19", "--knockout-tokens", "300", "--block-size", "16")
    cache = ("--cache-dir", str(tmp_path / "cache"))
    assert main([str(saved), *flags, *few, *cache, "--out", str(tmp_path / "out")]) == 0
    shares = pd.read_csv(tmp_path / "out/tables/expert_domain.csv")
    assert list(dict.fromkeys(shares["domain"])) == sorted(p.stem for p in texts.iterdir())
    assert (tmp_path / "out/report.html").is_file()

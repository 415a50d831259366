"""What finds no room is refused before any of it is made."""

import json
from pathlib import Path

import pytest
import torch
from small_models import make_dense
from transformers import GPT2Config, GPT2LMHeadModel

from moe_emergence.errors import RunError
from moe_emergence.models import upcycle
from moe_emergence.models.loading import load_trained_model
from moe_emergence.models.room import check_fits, weights_in
from moe_emergence.training.memory import explained


def test_weights_are_those_of_the_model() -> None:
    model = make_dense()
    assert weights_in(GPT2LMHeadModel, model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 12 * 2**18}, r"--base x: [\d,.]+ billion weights take [\d,]+ GB in fp32"),
        ({"n_layer": 10**9}, r"--base x: num_hidden_layers 1000000000: a model has 1 to 4096"),
        ({"n_embd": 2**62}, r"--base x: its sizes make no model"),
        ({"n_head": 5}, r"--base x: its sizes make no model, ValueError: .*divisible"),
    ],
)
def test_what_is_no_model_or_too_large_names_the_flag(
    changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_fits("--base", "x", GPT2LMHeadModel, GPT2Config(**changes))


def test_too_many_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--num-experts 1000000000: .* fewer experts"):
        upcycle(make_dense(), [1], 10**9, 1)


def test_a_model_folder_is_read_no_further_than_its_sizes(tmp_path: Path) -> None:
    make_dense().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_embd": 2**20}))
    with pytest.raises(ValueError, match=r"billion weights take"):
        load_trained_model(tmp_path)


def test_want_of_memory_says_what_to_change_and_nothing_else_is_caught() -> None:
    with pytest.raises(RunError, match=r"out of memory; lower --batch-size"), explained():
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), explained():
        torch.ones(2, 3) @ torch.ones(2, 3)

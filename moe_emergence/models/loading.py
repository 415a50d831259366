"""Where a dense base comes from: a hub id, a folder, or fresh weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from moe_emergence.config import ModelConfig, check, check_layers_exist


def new_dense_model(
    model: ModelConfig, tokenizer: Tokenizer, block_size: int, seed: int
) -> GPT2LMHeadModel:
    """A GPT-2 with fresh weights, of the size `model` names, for blocks of `block_size` tokens."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=block_size,
            n_layer=model.n_layer,
            n_embd=model.n_embd,
            n_head=model.n_head,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **_dropout(model),
        )
    )


def load_dense_model(
    model: ModelConfig, tokenizer: Tokenizer, block_size: int, cache_dir: str
) -> GPT2LMHeadModel:
    """The dense GPT-2 that `--base` names, checked against tokenizer, block size and layers.

    Raises:
        ValueError: when it cannot be loaded, is not a dense GPT-2, or does not fit the rest.
    """
    base = model.base
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            base,
            cache_dir=str(Path(cache_dir) / "models"),
            dtype=torch.float32,
            **_dropout(model),
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--base {base}: no model could be loaded ({reason}); give a folder with a GPT-2 "
            f'model, or "scratch" with --pretrain-steps'
        ) from error
    if not isinstance(loaded, GPT2LMHeadModel):
        raise ValueError(f"--base {base}: give a dense GPT-2, not {type(loaded).__name__}")
    check(
        len(tokenizer) <= loaded.config.vocab_size,
        "--tokenizer",
        f"with {len(tokenizer)} entries",
        f"give one that fits --base {base}, which has {loaded.config.vocab_size}",
    )
    check(
        block_size <= loaded.config.n_positions,
        "--block-size",
        block_size,
        f"give at most {loaded.config.n_positions}, what --base {base} can see",
    )
    check_layers_exist(model.moe_layers, loaded.config.n_layer)
    return loaded


def load_trained_model(folder: Path) -> PreTrainedModel:
    """The model in a run's `best-model`, `final-model` or checkpoint folder, dense or mixture."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


def _dropout(model: ModelConfig) -> dict[str, Any]:
    return dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.dropout)

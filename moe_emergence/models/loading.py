"""Where a dense base comes from: a hub id, a folder, or fresh weights."""

import pickle
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerFast as Tokenizer

from moe_emergence.config import ModelConfig, check_layers_exist
from moe_emergence.hub_access import check_model_reachable, reason
from moe_emergence.models.families import FAMILIES, Family
from moe_emergence.models.mixture import MixtureModel
from moe_emergence.models.room import check_fits
from moe_emergence.settings import check
from moe_emergence.smollm2 import SMOLLM2, smollm2_folder

LanguageModel = PreTrainedModel
"""Dense, or a `MixtureModel`."""


def new_dense_model(
    model: ModelConfig, tokenizer: Tokenizer, block_size: int, seed: int
) -> GPT2LMHeadModel:
    """A GPT-2 with fresh weights, of the size `model` names, for blocks of `block_size` tokens."""
    torch.manual_seed(seed)
    config = _new_config(model, len(tokenizer), block_size, tokenizer.eos_token_id)
    check_fits("--n-layer", model.n_layer, GPT2LMHeadModel, config)
    return GPT2LMHeadModel(config)


def _new_config(model: ModelConfig, vocab_size: int, block_size: int, end: int | None) -> Any:
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=block_size,
        n_layer=model.n_layer,
        n_embd=model.n_embd,
        n_head=model.n_head,
        bos_token_id=end,
        eos_token_id=end,
        **_dropout(FAMILIES[GPT2LMHeadModel], model),
    )


def dense_config(model: ModelConfig, vocab_size: int, block_size: int, cache_dir: str) -> Any:
    """The configuration of the dense model that `--base` names, without its weights.

    Of a base that is made from scratch, or by a run that is still to come, it is that of a GPT-2
    of the size that `model` names.

    Raises:
        ValueError: when neither this machine nor the hub has the base.
    """
    # hub ids are NAME or OWNER/NAME
    to_come = model.base.count("/") > 1 and not Path(model.base).exists()
    if model.base == "scratch" or to_come:
        return _new_config(model, vocab_size, block_size, None)
    return _find_config(*_source(model, cache_dir))


def _source(model: ModelConfig, cache_dir: str) -> tuple[str, dict[str, Any]]:
    """What to load, and from where."""
    base = str(smollm2_folder(cache_dir)) if model.base == SMOLLM2 else model.base
    return base, {"cache_dir": str(Path(cache_dir) / "models")}


def _find_config(base: str, options: dict[str, Any]) -> Any:
    """Of a folder, of the cache, or of the hub.

    Raises:
        ValueError: when none of them has it.
    """
    try:
        try:
            return AutoConfig.from_pretrained(base, local_files_only=True, **options)
        except OSError:
            if Path(base).is_dir():
                raise
            check_model_reachable(base)
            return AutoConfig.from_pretrained(base, **options)
    except Exception as error:  # a damaged file fails in as many ways as there are fields in it
        raise ValueError(
            f"--base {base}: no model could be loaded ({reason(error)}); give a folder with "
            f'a dense model, or "scratch" with --pretrain-steps'
        ) from error


def load_dense_model(
    model: ModelConfig, tokenizer: Tokenizer, block_size: int, cache_dir: str
) -> PreTrainedModel:
    """The dense model that `--base` names, checked against tokenizer, block size and layers.

    Raises:
        ValueError: when it cannot be loaded, is of no family that can be upcycled, or does not fit
            the rest.
    """
    base, options = _source(model, cache_dir)
    config = _find_config(base, options)
    family = _family_of_config(config)
    if family is None:
        known = ", ".join(family.name for family in FAMILIES.values())
        raise ValueError(
            f"--base {base}: give a dense model of {known}, not a {config.model_type} model"
        )
    check_fits("--base", base, family.dense, config)
    loaded = _load(base, "--base", **options, **_dropout(family, model))
    check(
        len(tokenizer) <= loaded.config.vocab_size,
        "--tokenizer",
        f"with {len(tokenizer)} entries",
        f"give one that fits --base {base}, which has {loaded.config.vocab_size}",
    )
    check(
        block_size <= loaded.config.max_position_embeddings,
        "--block-size",
        block_size,
        f"give at most {loaded.config.max_position_embeddings}, what --base {base} can see",
    )
    check_layers_exist(model, loaded.config.num_hidden_layers)
    return loaded


def load_trained_model(folder: Path) -> LanguageModel:
    """The model in a run's `best-model`, `final-model` or checkpoint folder, dense or mixture.

    Raises:
        ValueError: when there is none that can be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no model could be loaded (there is no such folder)")
    _check_fits(folder)
    model = _load(str(folder), "model folder")
    if type(model) not in FAMILIES and not isinstance(model, MixtureModel):
        known = ", ".join(family.name for family in FAMILIES.values())
        raise ValueError(
            f"{folder}: holds a {type(model).__name__}, neither a dense model of {known} nor its "
            "mixture"
        )
    return model


def _check_fits(folder: Path) -> None:
    """Refuse a configuration that is none, or of a model without room, before memory is taken."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{folder}: no model could be loaded ({reason(error)})") from error
    check_fits("model folder", folder, AutoModelForCausalLM.from_config, config)


def _load(place: str, flag: str, **options: Any) -> Any:
    """The model in `place` in fp32, whole; `ValueError` naming `flag` otherwise."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, output_loading_info=True, **options
        )
    except pickle.UnpicklingError as error:  # whose own advice is to run what is in there
        raise ValueError(
            f"{flag} {place}: no model could be loaded (its weights are a pickle of more than "
            "tensors, which could run any code); give one with safetensors"
        ) from error
    except Exception as error:  # a damaged file fails in as many ways as there are fields in it
        raise ValueError(f"{flag} {place}: no model could be loaded ({reason(error)})") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{flag} {place}: its weights lack {missing[0]} and {len(missing) - 1} more; give a "
            f"complete model folder"
        )
    # weights may lie in the file's own memory, at any address; a product's last bit depends on it,
    # and a resumed run has to repeat the uninterrupted one
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def _dropout(family: Family, model: ModelConfig) -> dict[str, Any]:
    return dict.fromkeys(family.dropout, model.dropout)


def _family_of_config(config: Any) -> Family | None:
    return next((f for f in FAMILIES.values() if f.dense.config_class is type(config)), None)

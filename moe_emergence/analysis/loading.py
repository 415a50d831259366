"""Loading any language model in transformers: as what, where, and whether there is room."""

import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import moe_emergence.models  # noqa: F401 - makes its model types known to transformers
from moe_emergence.device import find_device
from moe_emergence.hub_access import check_model_reachable, reason
from moe_emergence.models.room import GB, weights_in
from moe_emergence.names import SPREAD, WeightDtype
from moe_emergence.settings import check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Placement:
    """Where a model's weights go, and as what."""

    device: str = "cpu"
    """As `--device` says; "spread" is all devices, and the host's memory for what is left."""
    dtype: WeightDtype = "auto"
    """auto: as they were saved."""


def load_model(place: str, placement: Placement) -> tuple[Any, "PreTrainedTokenizerBase"]:
    """Model in evaluation mode, and tokenizer, of a folder or a hub id.

    Raises:
        ValueError: naming SOURCE, when they cannot be loaded or the weights find no room.
    """
    try:
        if not Path(place).is_dir():
            check_model_reachable(place)
        config = AutoConfig.from_pretrained(place)
        dtype = DTYPES.get(placement.dtype) or config.dtype or torch.float32
        _check_room(place, config, dtype, placement)
        spread = {"device_map": "auto"} if placement.device == SPREAD else {}
        model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **spread)
        tokenizer = AutoTokenizer.from_pretrained(place)
    except pickle.UnpicklingError as error:  # whose own advice is to run what is in there
        raise ValueError(
            f"SOURCE {place}: its weights are a pickle of more than tensors, which could run any "
            "code; give a model with safetensors"
        ) from error
    except Exception as error:  # a damaged file fails in as many ways as there are fields in it
        if str(error).startswith("SOURCE"):
            raise
        raise ValueError(_not_loaded(place, error)) from error
    if placement.device != SPREAD:
        model = model.to(find_device(placement.device))
    return model.eval(), tokenizer


def _not_loaded(place: str, error: Exception) -> str:
    return (
        f"SOURCE {place}: no model with a tokenizer could be loaded ({reason(error)}); give a run "
        "folder, a model folder, or the id of a model on the hub"
    )


def _check_room(place: str, config: Any, dtype: torch.dtype, placement: Placement) -> None:
    """Say what the weights take, and refuse what would end in an error of memory."""
    count = weights_in(AutoModelForCausalLM.from_config, config)
    needed, free = count * dtype.itemsize, free_bytes(placement)
    said = f"{count / GB:.1f} billion weights, {needed / GB:.1f} GB in {dtype}"
    if needed >= GB:
        logger.info("%s: %s; %.1f GB are free", place, said, free / GB)
    check(
        needed <= free,
        "SOURCE",
        place,
        f"{said}, and {free / GB:.1f} GB are free; give --dtype bf16, --device {SPREAD} (all GPUs "
        "and the host's memory), or a smaller model",
    )


def free_bytes(placement: Placement) -> int:
    """Memory that is free for weights."""
    host = int(psutil.virtual_memory().available)
    count = torch.cuda.device_count()
    if placement.device == SPREAD:
        return host + sum(torch.cuda.mem_get_info(n)[0] for n in range(count))
    device = find_device(placement.device)
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host

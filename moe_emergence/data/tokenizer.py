"""The tokenizer of a run: GPT-2's from the hub, one from a folder, or one trained here."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_emergence.config import DataConfig
from moe_emergence.disk import made_once
from moe_emergence.hub_access import check_model_reachable, reason
from moe_emergence.progress import progress_bar
from moe_emergence.smollm2 import SMOLLM2, smollm2_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GPT2_REPO = "openai-community/gpt2"
END_OF_TEXT = "<|endoftext|>"
ENCODE_BATCH = 64


def load_tokenizer(config: DataConfig, train_texts: Sequence[str]) -> "PreTrainedTokenizerFast":
    """The tokenizer that `--tokenizer` names; `train_texts` are used by "train" alone.

    Raises `ValueError` in one line if it is not there, is damaged or has no end-of-text token.
    """
    if config.tokenizer == "train":
        return trained_tokenizer(train_texts, config.vocab_size, config.cache_dir)
    if config.tokenizer == "gpt2":
        return gpt2_tokenizer(str(Path(config.cache_dir, "hub")))
    if config.tokenizer == SMOLLM2:
        return folder_tokenizer(str(smollm2_folder(config.cache_dir, "--tokenizer")))
    return folder_tokenizer(config.tokenizer)


def checked(tokenizer: Any, name: str) -> "PreTrainedTokenizerFast":
    """The tokenizer itself if it is a fast one with a vocabulary and an end-of-text token."""
    from transformers import PreTrainedTokenizerFast

    change = "give a folder with a complete tokenizer, or --tokenizer train"
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"--tokenizer {name}: it has no tokenizer.json to be fast with; {change}")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(f"--tokenizer {name}: it has no vocabulary; {change}")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--tokenizer {name}: it has no end-of-text (eos) token; {change}")
    try:
        tokenizer(["a"], add_special_tokens=False)
    except Exception as error:  # every setting that is wrong fails in its own way
        raise ValueError(
            f"--tokenizer {name}: it cannot encode a text ({reason(error)}); {change}"
        ) from error
    return tokenizer


def folder_tokenizer(path: str) -> "PreTrainedTokenizerFast":
    """The tokenizer saved in a folder."""
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise ValueError(
            f'--tokenizer {path}: no such folder; give "gpt2", "train" or a folder with a tokenizer'
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # a damaged file fails in as many ways as there are formats
        raise ValueError(
            f"--tokenizer {path}: no tokenizer could be read from it ({reason(error)}); give a "
            "folder that save_pretrained wrote"
        ) from error
    return checked(tokenizer, path)


def gpt2_tokenizer(cache_dir: str) -> "PreTrainedTokenizerFast":
    """GPT-2's tokenizer: from `cache_dir` if it is there, otherwise downloaded into it."""
    from transformers import AutoTokenizer

    try:
        cached = AutoTokenizer.from_pretrained(
            GPT2_REPO, cache_dir=cache_dir, local_files_only=True
        )
    except (OSError, ValueError):
        cached = None  # not there yet, or only a part of it
    if cached is not None and len(cached) > len(cached.all_special_ids):
        return checked(cached, "gpt2")
    try:
        # One request that fails at once: the download itself retries for most of a minute.
        check_model_reachable(GPT2_REPO)
        tokenizer = AutoTokenizer.from_pretrained(GPT2_REPO, cache_dir=cache_dir)
    except OSError as error:
        raise ValueError(
            f"--tokenizer gpt2: the Hugging Face hub could not be reached ({error}); give "
            "--tokenizer PATH, a folder with a tokenizer, or --tokenizer train"
        ) from error
    return checked(tokenizer, "gpt2")


def trained_tokenizer(
    texts: Sequence[str], vocab_size: int, cache_dir: str
) -> "PreTrainedTokenizerFast":
    """Byte-level BPE of at most `vocab_size` entries, `<|endoftext|>` included, trained on `texts`.

    The same texts and size give the same tokenizer, which is kept under `cache_dir`.
    """
    from transformers import PreTrainedTokenizerFast

    digest = hashlib.sha256(str(vocab_size).encode())
    for text in texts:
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    folder = Path(cache_dir, "tokenizers", digest.hexdigest())
    made_once(folder, lambda new: train_bpe(texts, vocab_size).save_pretrained(new))
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:
        raise ValueError(
            f"--tokenizer train: {folder} is damaged ({reason(error)}); delete it"
        ) from error
    return checked(tokenizer, "train")


def train_bpe(texts: Sequence[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train the byte-level BPE; it encodes and decodes any text without loss."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # its own bars stay on the screen
    )
    with progress_bar("training a tokenizer", None):
        backend.train_from_iterator(texts, trainer=trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def encode_documents(
    tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str], description: str
) -> list[list[int]]:
    """Token ids of every text, nothing added; special tokens written out in a text are text."""
    token_lists: list[list[int]] = []
    with progress_bar(description, len(texts)) as advance:
        for start in range(0, len(texts), ENCODE_BATCH):
            batch = list(texts[start : start + ENCODE_BATCH])
            encoded = tokenizer(
                batch,
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                verbose=False,  # documents are cut into blocks later: none is too long
            )
            token_lists.extend(encoded["input_ids"])
            advance(len(batch))
    return token_lists


def hash_tokenizer(tokenizer: "PreTrainedTokenizerFast") -> str:
    """SHA-256 of all that makes tokens of a text, and of the end-of-text id.

    That is vocabulary, merges, normaliser, and how a text is cut up and put together again.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    made_of = {k: v for k, v in backend.items() if k not in ("version", "truncation", "padding")}
    content = json.dumps([made_of, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()

"""Prepared data in a folder: the blocks themselves, to train from without texts or a network.

`blocks.safetensors` has a (N, block_size) tensor per split and domain, uint16 where that holds
the vocabulary and int32 otherwise; `tokenizer/` is what `save_pretrained` writes, and
`data_manifest.json` that of a run on this data.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save

from moe_emergence.config import DataConfig, TokenClass
from moe_emergence.config.data import check_domain_names, token_classes
from moe_emergence.data.manifest import hash_blocks, token_classes_of
from moe_emergence.data.tokenizer import folder_tokenizer, hash_tokenizer
from moe_emergence.disk import clear_unfinished, whole_file, whole_folder, write_text
from moe_emergence.hub_access import reason
from moe_emergence.settings import check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BLOCKS, MANIFEST, TOKENIZER = "blocks.safetensors", "data_manifest.json", "tokenizer"


@dataclass(frozen=True)
class PreparedData:
    """What a run trains and evaluates on.

    Blocks are (N, block_size) int32 per domain. `manifest` is JSON-ready and describes them; its
    domains are those of the blocks, in the same order.
    """

    tokenizer: "PreTrainedTokenizerFast"
    train_blocks: dict[str, torch.Tensor]
    eval_blocks: dict[str, torch.Tensor]
    manifest: dict[str, Any]

    @property
    def token_classes(self) -> dict[str, TokenClass]:
        """How the tokens of each domain are told apart."""
        return token_classes_of(self.manifest)


def is_prepared(path: str) -> bool:
    """Whether `path` is such a folder."""
    return Path(path, BLOCKS).is_file()


def save_prepared(data: PreparedData, folder: Path) -> None:
    """Write `data` into `folder`, which `--data` then takes.

    Raises:
        RunError: when the disk is full or not writable, naming the path.
    """
    clear_unfinished(folder)
    splits = {"train": data.train_blocks, "eval": data.eval_blocks}
    dtype = torch.uint16 if len(data.tokenizer) <= 2**16 else torch.int32
    blocks = {f"{s}.{d}": rows.to(dtype) for s, of in splits.items() for d, rows in of.items()}
    write_text(folder / MANIFEST, json.dumps(data.manifest, indent=2) + "\n")
    with whole_folder(folder / TOKENIZER) as new:
        data.tokenizer.save_pretrained(new)
    # the last, as it makes the folder one of prepared data
    with whole_file(folder / BLOCKS) as new:
        # as bytes: `save_file` would put a file of its own beside it first
        new.write_bytes(save(blocks))


def load_prepared(config: DataConfig, seed: int) -> PreparedData:
    """The data in the folder `config.data`, with the tokenizer they were made with.

    Raises:
        ValueError: when a file is missing or is not what the manifest says, and for settings that
            are not those the blocks were made with.
    """
    folder, again = Path(config.data), "prepare the data again"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        blocks = {k: v.to(torch.int32) for k, v in load_file(folder / BLOCKS).items()}
        made = {name: manifest[name] for name in ("block_size", "seed", "balance_tokens")}
        # folders without the entry were made before anything was dropped
        made["near_duplicates"] = manifest.get("near_duplicates", "keep")
        expected = {
            f"{split}.{domain}": manifest["domains"][domain][split]["sha256"]
            for split in ("train", "eval")
            for domain in manifest["domains"]
        }
        tokenizer_hash = manifest["tokenizer"]["sha256"]
        classes = token_classes_of(manifest) | token_classes(config.token_types)
        check_domain_names(tuple(classes), f"{MANIFEST}: domain")
    except Exception as error:  # damaged files fail in as many ways as there are fields in them
        raise ValueError(f"--data {folder}: damaged ({reason(error)}); {again}") from error
    for flag, name, value in (
        ("--block-size", "block_size", config.block_size),
        ("--split-seed", "seed", seed),
        ("--balance-tokens", "balance_tokens", config.balance_tokens),
        ("--near-duplicates", "near_duplicates", config.near_duplicates),
    ):
        check(
            made[name] == value,
            flag,
            value,
            f"the blocks in {folder} were made with {made[name]}; give that, or {again}",
        )
    found = {name: hash_blocks(tensor.numpy()) for name, tensor in blocks.items()}
    check(found == expected, "--data", folder, f"{BLOCKS} is not that of {MANIFEST}; {again}")
    tokenizer = folder_tokenizer(str(folder / TOKENIZER))
    check(
        hash_tokenizer(tokenizer) == tokenizer_hash,
        "--data",
        folder,
        f"the tokenizer is not that of {MANIFEST}; {again}",
    )
    fit = all(
        rows.dim() == 2
        and rows.shape[1] == config.block_size
        and len(rows)
        and 0 <= int(rows.min()) <= int(rows.max()) < len(tokenizer)
        for rows in blocks.values()
    )
    check(fit, "--data", folder, f"{BLOCKS} has other than blocks of tokens; {again}")

    domains = config.domains or tuple(manifest["domains"])
    unknown = [domain for domain in domains if domain not in manifest["domains"]]
    check(
        not unknown,
        "--domains",
        " ".join(unknown),
        f"{folder} has {', '.join(manifest['domains'])}; choose from these",
    )
    entries = {d: manifest["domains"][d] | {"token_types": classes[d]} for d in domains}

    def of(split: str) -> dict[str, torch.Tensor]:
        return {domain: blocks[f"{split}.{domain}"] for domain in domains}

    return PreparedData(tokenizer, of("train"), of("eval"), manifest | {"domains": entries})

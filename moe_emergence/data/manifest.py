"""What the data of a run was, as JSON: provenance, counts and hashes, to be compared on resume."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import numpy as np

from moe_emergence.config import SHIPPED, TokenClass
from moe_emergence.data.packing import Blocks, PackedBlocks
from moe_emergence.data.samples import poor_share

PROVENANCE = ("source", "kind")
TO_READ = ("samples", "poor_blocks", "token_types")
SETTINGS = {
    "block_size": "--block-size",
    "seed": "--seed",
    "balance_tokens": "--balance-tokens",
    "near_duplicates": "--near-duplicates",
    "tokenizer": "--tokenizer",
}


_SHIPPED_CLASSES: tuple[TokenClass, ...] = ("python", "math", "words")


def token_classes_of(manifest: Mapping[str, Any]) -> dict[str, TokenClass]:
    """The domains of a manifest, in order, and how the tokens of each are told apart.

    Manifests that do not say are of times when all text was code, math or prose. Raises
    `ValueError` for what is no such manifest.
    """
    usual: dict[str, TokenClass] = dict(zip(SHIPPED, _SHIPPED_CLASSES, strict=True))
    found = {}
    for domain, entry in manifest["domains"].items():
        said: TokenClass | None = entry.get("token_types")
        found[domain] = said or usual.get(domain, "none")
        if found[domain] not in get_args(TokenClass):
            raise ValueError(f"token_types of {domain} is {said!r}")
    return found


def hash_blocks(blocks: Blocks) -> str:
    """SHA-256 of the shape (N, L) and the tokens, both little-endian (int64 and int32)."""
    digest = hashlib.sha256(np.array(blocks.shape, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(blocks, dtype="<i4").tobytes())
    return digest.hexdigest()


def describe_split(texts: Sequence[str], packed: PackedBlocks, blocks: Blocks) -> dict[str, Any]:
    """Counts and hash of one split; `blocks` are those of `packed` that are used."""
    return {
        "documents": len(texts),
        "characters": sum(map(len, texts)),
        "tokens": packed.tokens,
        "blocks": len(blocks),
        "poor_blocks": round(poor_share(blocks), 4),
        "sha256": hash_blocks(blocks),
    }


def differences(saved: Any, present: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of the entries that differ, in the order of `present`.

    Provenance is left out, and what is there for people to read.
    """
    if isinstance(saved, dict) and isinstance(present, dict):
        for name in dict.fromkeys((*present, *saved)):
            if name not in PROVENANCE + TO_READ:
                yield from differences(saved.get(name), present.get(name), (*path, name))
    elif saved != present:
        yield path


def entry(manifest: dict[str, Any], path: tuple[str, ...]) -> Any:
    """The entry at a path, None where there is none."""
    found: Any = manifest
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def check_same_data(saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Raise `ValueError` if two manifests are not of the same blocks, settings and tokenizer.

    Where the text came from is not compared: the same tokens from another place are the same data.
    The message names the first entry that differs.
    """
    path = next(differences(saved, present), None)
    if path is None:
        return
    flag = SETTINGS.get(path[0], "the data settings")
    raise ValueError(
        f"data of the run to resume: {'.'.join(path)} was {entry(saved, path)} and is now "
        f"{entry(present, path)}; a resume needs the same data: restore {flag} or start a new "
        "--run-name"
    )

import copy
import json

import numpy as np
import pytest

from moe_emergence.data.manifest import check_same_data, describe_split, hash_blocks
from moe_emergence.data.packing import pack


def manifest() -> dict:
    packed = pack([[1, 2, 3], [4, 5]], 0, 3)
    part = describe_split(["one", "twö"], packed, packed.blocks)
    domain = {
        "source": {"source": "embedded", "version": "3.11.7"},
        "duplicates_dropped": 1,
        "train": part,
        "eval": dict(part),
    }
    return {
        "block_size": 3,
        "seed": 42,
        "balance_tokens": True,
        "tokenizer": {"kind": "train", "vocab_size": 300, "sha256": "ab"},
        "domains": {name: copy.deepcopy(domain) for name in ("code", "math", "prose")},
    }


def leaves(tree: dict, path: tuple[str, ...] = ()):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name)


def test_split_description_counts_documents_characters_tokens_and_blocks() -> None:
    part = manifest()["domains"]["code"]["train"]
    assert (part["documents"], part["characters"]) == (2, 6)
    assert (part["tokens"], part["blocks"]) == (7, 2)


def test_the_same_data_pass_also_after_json() -> None:
    check_same_data(json.loads(json.dumps(manifest())), manifest())


@pytest.mark.parametrize("path", list(leaves(manifest())), ids=".".join)
def test_every_changed_entry_is_refused_by_name_except_provenance(path) -> None:
    present = manifest()
    place = present
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = "changed"
    if "source" in path or path[-1] in ("kind", "poor_blocks"):
        check_same_data(manifest(), present)
        return
    for saved, now in ((manifest(), present), (present, manifest())):
        with pytest.raises(ValueError, match=r"same data.*--run-name") as raised:
            check_same_data(saved, now)
        assert f" {'.'.join(path)} was " in str(raised.value)
        assert "changed" in str(raised.value)


def test_a_missing_entry_is_a_difference_from_either_side() -> None:
    present = manifest()
    del present["domains"]["math"]["eval"]
    for saved, now in ((manifest(), present), (present, manifest())):
        with pytest.raises(ValueError, match=r"domains\.math\.eval"):
            check_same_data(saved, now)


def test_a_changed_setting_is_named_before_what_follows_from_it() -> None:
    present = manifest()
    present["domains"]["code"]["train"]["sha256"] = "other"
    present["block_size"] = 4
    with pytest.raises(ValueError, match=r"block_size was 3 and is now 4.*--block-size"):
        check_same_data(manifest(), present)


def test_the_hash_covers_tokens_order_and_shape() -> None:
    blocks = np.arange(12, dtype=np.int32).reshape(3, 4)
    changed = blocks.copy()
    changed[2, 3] += 1
    others = [changed, blocks[::-1], blocks.reshape(4, 3), blocks[:2]]
    assert len({hash_blocks(b) for b in [blocks, *others]}) == 5
    assert hash_blocks(blocks) == hash_blocks(np.asfortranarray(blocks.astype(">i4")))


def test_what_is_there_to_read_is_not_compared() -> None:
    """Manifests of former versions lack it, and their runs can go on."""
    with_samples = manifest()
    with_samples["domains"]["code"] |= {"samples": ["def f"]}
    without = manifest()
    del without["domains"]["math"]["eval"]["poor_blocks"]
    check_same_data(without, with_samples)
    check_same_data(with_samples, without)

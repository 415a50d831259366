import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_emergence.data.packing import balance, check_blocks, pack, warn_if_unbalanced

EOS = 0
TOKENS = st.lists(st.lists(st.integers(1, 50_256), max_size=20), max_size=20)


@given(TOKENS, st.integers(2, 40))
def test_every_token_comes_once_and_in_order(documents: list[list[int]], block_size: int) -> None:
    expected = [token for document in documents for token in (*document, EOS)]
    packed = pack(documents, EOS, block_size)
    assert packed.blocks.dtype == np.int32
    assert packed.blocks.shape == (len(expected) // block_size, block_size)
    assert packed.tokens == len(expected)
    assert packed.dropped == len(expected) % block_size
    assert packed.blocks.ravel().tolist() == expected[: packed.blocks.size]


def test_no_documents_make_no_blocks() -> None:
    assert pack([], EOS, 8).blocks.shape == (0, 8)


def test_a_split_without_a_block_is_refused_by_name() -> None:
    check_blocks("math", "train", pack([[1] * 7], EOS, 8))
    message = r"^math: the evaluation split has 7 tokens, .* of 8; .*--size-mb.*--block-size"
    with pytest.raises(ValueError, match=message):
        check_blocks("math", "evaluation", pack([[1] * 6], EOS, 8))


@given(
    st.lists(st.integers(1, 12), min_size=3, max_size=3),
    st.integers(0, 2**31 - 1),
)
def test_balancing_keeps_the_smallest_count_of_distinct_rows(counts, seed) -> None:
    blocks = {
        name: np.arange(count * 2, dtype=np.int32).reshape(count, 2)
        for name, count in zip("abc", counts, strict=True)
    }
    balanced = balance(blocks, seed)
    assert list(balanced) == list(blocks)
    for name, rows in balanced.items():
        assert len(rows) == min(counts)
        assert rows.dtype == np.int32
        kept = {tuple(row) for row in rows.tolist()}
        assert len(kept) == len(rows)
        assert kept <= {tuple(row) for row in blocks[name].tolist()}
    again = balance(blocks, seed)
    assert all(np.array_equal(balanced[name], again[name]) for name in blocks)


def test_balancing_samples_the_whole_domain_not_its_beginning() -> None:
    blocks = {
        "small": np.zeros((50, 1), dtype=np.int32),
        "large": np.arange(1000, dtype=np.int32)[:, None],
    }
    kept = balance(blocks, 7)["large"][:, 0]
    assert kept.max() > 800
    assert not np.array_equal(kept, balance(blocks, 8)["large"][:, 0])


@pytest.mark.parametrize(("counts", "warned"), [((2, 3), False), ((3, 2), False), ((20, 31), True)])
def test_imbalance_warns_above_a_ratio_of_one_and_a_half(counts, warned, caplog) -> None:
    warn_if_unbalanced({str(n): np.zeros((n, 2), dtype=np.int32) for n in counts})
    assert ("unbalanced domains" in caplog.text) == warned

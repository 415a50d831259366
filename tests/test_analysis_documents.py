"""Which document a block is of, which blocks stand for a text, and intervals over documents."""

from collections import Counter

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_emergence.analysis.documents import (
    FEWEST,
    main_documents,
    resampling_units,
    spread,
)
from moe_emergence.analysis.modules import judge
from moe_emergence.data.packing import pack

EOS = 7
COUNTS = st.integers(0, 60)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12), st.integers(2, 9))
def test_a_block_is_of_the_document_that_most_of_it_is_of(lengths: list[int], size: int) -> None:
    packed = pack([[1] * length for length in lengths], EOS, size)
    of_token = [place for place, length in enumerate(lengths) for _ in range(length + 1)]
    expected = []
    for row in range(len(packed.blocks)):
        counts = Counter(of_token[row * size : (row + 1) * size])
        expected.append(min(counts, key=lambda place: (-counts[place], place)))
    found = main_documents(torch.from_numpy(packed.blocks), EOS)
    assert list(found) == expected


@given(COUNTS, st.integers(1, 60))
def test_blocks_are_taken_evenly_apart(count: int, most: int) -> None:
    places = spread(count, most)
    assert len(places) == min(count, most)
    assert set(places) <= set(range(count))
    gaps = np.diff([*places, count])
    assert (gaps > 0).all()
    if len(gaps):
        assert places[0] == 0
        assert gaps.max() - gaps.min() <= 1


@given(st.lists(st.integers(0, 8), min_size=1, max_size=30))
def test_blocks_are_drawn_with_their_document_where_there_are_enough(documents: list[int]) -> None:
    units = resampling_units(np.array(documents))
    assert sorted(set(units)) == list(range(len(set(units))))
    together = {(a == b, u == v) for a, u in zip(documents, units, strict=True)
                for b, v in zip(documents, units, strict=True)}  # fmt: skip
    if len(set(documents)) >= FEWEST:
        assert all(same == drawn for same, drawn in together)
    else:
        assert len(set(units)) == len(documents)


def test_an_interval_over_documents_holds_for_other_documents() -> None:
    documents, repeats = 24, 150
    rng = np.random.default_rng(0)
    place = np.repeat(np.arange(documents), rng.integers(5, 12, documents))
    covered = {"documents": 0, "blocks": 0}
    for _ in range(repeats):
        lost = rng.normal(1, 1, size=documents)[place] + 0.1 * rng.normal(size=len(place))
        for how, of in {"documents": place, "blocks": np.arange(len(place))}.items():
            named = {"code": lost, "math": lost}
            found = judge("code", named, [named], {"code": of, "math": of}, 0)
            covered[how] += found["damage_low"] <= 1 <= found["damage_high"]
    assert covered["documents"] > 0.88 * repeats
    assert covered["blocks"] < 0.65 * repeats

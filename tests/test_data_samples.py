"""What is code and what is data in Python's clothes, and what a person sees of a domain."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_emergence.data.embedded import MOST_LITERALS, read_code
from moe_emergence.data.literals import literal_share
from moe_emergence.data.samples import POOR, poor_share, samples, unlike

FUNCTION = '''def area(width: float, height: float) -> float:
    """Surface of a rectangle:
    width times height."""
    if width < 0 or height < 0:
        raise ValueError(
            f"{width} by {height}: a side is negative"
        )
    return width * height


'''


def table(rows: int) -> str:
    return "decoding = {\n" + "".join(f"    {n:#06x}: {n * 7:#06x},\n" for n in range(rows)) + "}\n"


def test_code_is_no_table_and_a_table_is_no_code() -> None:
    assert literal_share(FUNCTION * 3) == 0.0
    assert literal_share(table(50)) > 0.95
    assert literal_share("x = (\n    'a'\n    'b'\n)\n" * 9) == pytest.approx(11 / 24)
    assert literal_share("def f(:\n  pass") == 0.0
    assert literal_share("x = '\0'") == literal_share("") == 0.0


@given(st.integers(1, 40), st.integers(0, 12), st.sampled_from(["", "# Größe: 10 µm\n"]))
def test_the_share_is_that_of_the_text_in_the_literal(rows: int, functions: int, head: str) -> None:
    source = head + table(rows) + FUNCTION * functions
    literal = table(rows).removeprefix("decoding = ").rstrip("\n")
    assert literal_share(source) == pytest.approx(len(literal.encode()) / len(source.encode()))


@pytest.mark.parametrize("seed", [0, 1, 2, 42])
def test_embedded_code_is_code(seed: int) -> None:
    """With seed 0 most of the code evaluated on was codec tables once."""
    texts = read_code(2_000_000, seed).texts
    assert sum(map(len, texts)) > 1_500_000
    assert max(map(literal_share, texts)) <= MOST_LITERALS
    lines = [line.strip() for text in texts for line in text.splitlines()]
    assert sum(line.startswith("0x") for line in lines) < 0.01 * len(lines)


@given(st.lists(st.lists(st.integers(0, 9), min_size=6, max_size=6), min_size=1, max_size=30))
def test_poor_blocks_are_those_a_set_finds(rows: list[list[int]]) -> None:
    distinct = [len(set(row)) for row in rows]
    limit = POOR * np.quantile(distinct, 0.9)
    expected = sum(count < limit for count in distinct) / len(rows)
    assert poor_share(np.array(rows, np.int32)) == pytest.approx(expected)


def test_tables_beside_text_are_warned_of_and_text_alone_is_not() -> None:
    rng = np.random.default_rng(0)
    text, tables = rng.integers(0, 300, (60, 128)), rng.integers(0, 12, (40, 128))
    mixed = np.concatenate([text, tables])
    warnings = unlike({"code": poor_share(mixed), "prose": poor_share(text)})
    assert list(warnings) == ["code"]
    assert warnings["code"].startswith("code: 40% of the blocks")


class Letters:
    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


@pytest.mark.parametrize("blocks", [1, 2, 3, 50])
def test_samples_are_beginnings_of_blocks_from_first_to_last(blocks: int) -> None:
    rows = np.arange(blocks)[:, None] % 26 + np.zeros((1, 300), int)
    found = samples(Letters(), rows)  # type: ignore[arg-type]
    assert [len(text) for text in found] == [200] * min(3, blocks)
    assert found[0][0] == "a"
    assert found[-1][0] == chr(97 + (blocks - 1) % 26)

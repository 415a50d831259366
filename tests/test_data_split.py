import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_emergence.data.split import check_no_leakage, eval_count, identity, split_texts
from moe_emergence.data.texts import take_texts


@pytest.mark.parametrize("n", range(2))
def test_eval_count_refuses_what_cannot_be_split(n: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 distinct documents, not {n}"):
        eval_count(n)


def test_eval_count_follows_the_policy_for_every_n() -> None:
    for n in range(2, 5000):
        count = eval_count(n)
        assert 1 <= count < n
        if n < 10:
            assert count == 1
        else:
            assert 10 * count <= n  # never more than 10 percent
        if n >= 100:
            assert count >= 10
        if n >= 200:
            assert count == n // 20  # 5 percent
        assert count <= eval_count(n + 1)


@pytest.mark.parametrize(
    ("n", "count"), [(2, 1), (19, 1), (20, 2), (99, 9), (100, 10), (219, 10), (220, 11)]
)
def test_eval_count_at_its_corners(n: int, count: int) -> None:
    assert eval_count(n) == count


def test_eval_count_is_exact_for_numbers_beyond_floats() -> None:
    assert eval_count(20 * (10**17 + 1)) == 10**17 + 1


@given(
    st.lists(st.text(max_size=5), min_size=2, max_size=60).filter(
        lambda texts: len({identity(t) for t in texts}) > 1
    ),
    st.integers(0, 2**31 - 1),
    st.randoms(use_true_random=False),
)
def test_split_partitions_distinct_texts_whatever_their_order(texts, seed, random) -> None:
    split = split_texts("code", texts, seed)
    names = {identity(t) for t in texts}
    assert sorted(identity(t) for t in split.train + split.eval) == sorted(names)
    assert set(split.train + split.eval) <= set(texts)
    assert split.duplicates_dropped == len(texts) - len(names)
    assert len(split.eval) == eval_count(len(names))
    check_no_leakage("code", split.train, split.eval)

    shuffled = texts + texts[:3]
    random.shuffle(shuffled)
    again = split_texts("code", shuffled, seed)
    assert (again.train, again.eval) == (split.train, split.eval)


def test_split_depends_on_the_seed_and_mixes_neighbours() -> None:
    texts = [f"document {i:03d}" for i in range(200)]
    first, second = (split_texts("code", texts, seed) for seed in (1, 2))
    assert set(first.eval) != set(second.eval)
    assert first.train != sorted(first.train)


@pytest.mark.parametrize("texts", [[], ["a"], ["a", "a", "a"]])
def test_split_names_the_domain_that_is_too_small(texts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^math: .*at least 2 .* --size-mb .* --data"):
        split_texts("math", texts, 0)


def test_leakage_check_names_the_domain_and_quotes_the_document() -> None:
    check_no_leakage("prose", ["a", "b"], ["c"])
    offender = "Fellow citizens" + "x" * 500
    with pytest.raises(ValueError, match=r"^prose: .*'Fellow citizensx+'; ") as raised:
        check_no_leakage("prose", ["a", "".join(["Fellow ", offender[7:]])], ["c", offender])
    assert len(str(raised.value)) < 250


@given(st.lists(st.text(max_size=8), max_size=40), st.integers(1, 60))
def test_take_texts_takes_a_prefix_within_the_limit(texts: list[str], limit: int) -> None:
    usable = [t for t in texts if t.strip() and 2 * len(t.encode()) <= limit]
    taken = take_texts("code", texts, limit)
    assert taken == usable[: len(taken)]
    size = sum(len(t.encode()) for t in taken)
    assert size <= limit
    if len(taken) < len(usable):
        assert size + len(usable[len(taken)].encode()) > limit


def test_take_texts_stops_reading_at_the_limit() -> None:
    def endless():
        while True:
            yield "abcd"

    assert take_texts("code", endless(), 10) == ["abcd", "abcd"]


def test_take_texts_says_what_it_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert take_texts("code", ["a" * 8, " \n", "abc", "abd"], 10) == ["abc", "abd"]
    assert "code: 1 texts larger than half of --size-mb passed over" in caplog.text
    assert "code: 1 blank texts dropped" in caplog.text


TWINS: dict[str, Callable[[str], str]] = {
    "an exact copy": lambda t: t,
    "no last newline": lambda t: t.rstrip("\n"),
    "CRLF": lambda t: t.replace("\n", "\r\n"),
    "CR": lambda t: t.replace("\n", "\r"),
    "a byte order mark": lambda t: "\ufeff" + t,
    "decomposed characters": lambda t: unicodedata.normalize("NFD", t),
    "blank lines around": lambda t: "\n\n" + t + "  \n",
}


@pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS)
def test_copies_that_read_alike_are_one_document(twin: Callable[[str], str]) -> None:
    texts = [f"Document {i}: café naïve\nline {i}\n" for i in range(200)]
    alone, split = split_texts("prose", texts, 0), split_texts("prose", texts[::-1] + [
        twin(t) for t in texts], 0)  # fmt: skip
    assert split.duplicates_dropped == 200
    assert len(split.train) + len(split.eval) == 200
    assert not {identity(t) for t in split.train} & {identity(t) for t in split.eval}
    assert {identity(t) for t in (*split.train, *split.eval)} == {identity(t) for t in texts}
    if twin(texts[0]) == texts[0]:
        assert split.eval == alone.eval
    with pytest.raises(ValueError, match="is in the train split as well"):
        check_no_leakage("prose", texts, [twin(texts[3])])

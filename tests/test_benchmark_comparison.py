"""Who wins is what the rows say; who is refused is named with the reason, and never ranked."""

import re
import statistics
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.comparison import comparison, groups_of
from benchmarks.layer import timing_fields
from benchmarks.results import Row
from benchmarks.stopwatch import Samples

NAMES = ("sequential", "fused", "grouped", "floor", "imprecise")
TIMES = st.lists(st.floats(1e-4, 10.0), min_size=5, max_size=5)


def rows_of(samples: dict[str, Samples], suite: str = "layer") -> list[Row]:
    """Rows as the suites make them; a name that is a verdict has it, all others passed."""
    verdicts = {name: name if name in ("floor", "imprecise") else "passed" for name in samples}
    passed = [name for name, verdict in verdicts.items() if verdict == "passed"]
    blank = Row(suite, "g", "full", "", "")
    return [
        replace(
            blank,
            contestant=name,
            verdict=verdicts[name],
            **timing_fields(name, samples, passed, "sequential"),
        )
        for name in samples
    ]


@given(st.fixed_dictionaries(dict.fromkeys(NAMES, TIMES)))
def test_rankings_follow_medians_and_leads_the_rounds(times: dict[str, list[float]]) -> None:
    samples = {name: Samples(tuple(seconds)) for name, seconds in times.items()}
    (group,) = groups_of(rows_of(samples))
    ranking = group.ranking
    assert {row.contestant for row in ranking} == {"sequential", "fused", "grouped"}
    medians = [statistics.median(times[row.contestant]) for row in ranking]
    assert medians == sorted(medians)
    for row, following in pairwise(ranking):
        assert row.next_slower == following.contestant
        rounds = zip(times[following.contestant], times[row.contestant], strict=True)
        assert row.lead == statistics.median(theirs / ours for theirs, ours in rounds)
    assert ranking[-1].lead is None


ROUNDS = {
    "sequential": (4e-3, 8e-3, 4e-3, 4e-3, 4e-3),
    "fused": (2e-3, 4e-3, 2e-3, 2e-3, 2e-3),
    "grouped": (3e-3, 3e-3, 3e-3, 3e-3, 3e-3),
    "floor": (1e-3, 1e-3, 1e-3, 1e-3, 1e-3),
    "imprecise": (1e-4, 1e-4, 1e-4, 1e-4, 1e-4),
}


def shown(*more: Row) -> dict[str, str]:
    """The parts of a comparison of `ROUNDS` and more rows, by heading."""
    rows = rows_of({name: Samples(seconds) for name, seconds in ROUNDS.items()})
    rows[-1] = replace(rows[-1], note="w1 is 3.0 times as far")
    parts = re.split(r"(?m)^## (.*)\n\n", comparison([*rows, *more]))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def cells(part: str) -> list[list[str]]:
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_a_group_shows_its_winner_and_by_how_much() -> None:
    (won,) = cells(shown()["Winners"])
    assert won == [
        *("layer g", "full", "fused", "2 (2-2)"),
        # in one round of five it was behind: three of four it was ahead
        "grouped 1.50 (1.50-1.50)",
        "sequential 2.00 (2.00-2.00)",
    ]
    ranked = cells(shown()["layer g, full, 5 rounds"])
    assert [row[:2] for row in ranked] == [
        *(["1", "fused"], ["2", "grouped"], ["3", "sequential"], ["", "floor (floor)"]),
    ]
    assert ranked[2][2:] == ["4 (4-4)", "1.00 (1.00-1.00)", ""]


@pytest.mark.parametrize(("behind", "level"), [(1, False), (2, True)])
def test_ahead_in_fewer_than_three_of_four_rounds_is_level(behind: int, level: bool) -> None:
    seconds = tuple(2.0 if i < behind else 1.0 for i in range(5))
    rows = rows_of({"fused": Samples(seconds), "grouped": Samples((1.5,) * 5)})
    assert ("level |" in comparison(rows)) == level


def test_the_refused_are_kept_apart_with_their_reasons() -> None:
    absent = Row("layer", "g", "full", "megablocks", "not installed", "no module | 'megablocks'")
    wrong = Row("layer", "g", "full", "broken", "failed", "y is wrong")
    parts = shown(absent, wrong)
    for name, part in parts.items():
        if not name.startswith("Not compared"):
            assert not re.search(r"megablocks|broken|imprecise", part), name
    lines = parts["Not compared, and why"].strip().splitlines()
    assert lines == [
        "- broken: failed (layer g): y is wrong",
        "- imprecise: imprecise (layer g): w1 is 3.0 times as far",
        "- megablocks: not installed (layer g): no module | 'megablocks'",
    ]


def test_a_group_that_nobody_passed_has_no_winner() -> None:
    text = comparison([Row("layer", "g", "full", "sequential", "error", "out of memory")])
    assert cells(text.partition("## Winners")[2]) == [["layer g", "full", "none", "", "", ""]]


def test_sizes_of_a_sweep_are_groups_of_their_own() -> None:
    rows = [
        replace(row, suite="scaling", parameters={"sweep": "experts", "experts": experts})
        for experts in (4, 8)
        for row in rows_of({name: Samples(seconds) for name, seconds in ROUNDS.items()})
    ]
    winners = cells(comparison(rows).partition("## Winners")[2])
    assert [row[0] for row in winners] == ["scaling g experts=4", "scaling g experts=8"]
    assert {row[2] for row in winners} == {"fused"}

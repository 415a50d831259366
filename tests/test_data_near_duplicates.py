"""Training documents that resemble those of the evaluation are found, counted and dropped."""

import dataclasses
import json
import logging
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_emergence.config import SHIPPED, DataConfig, RunConfig
from moe_emergence.data import prepare_data
from moe_emergence.data.near_duplicates import (
    SIMILARITY,
    near_duplicates,
    shingles,
    without_near_duplicates,
)
from moe_emergence.data.prepare import split_domains
from moe_emergence.data.split import Split
from moe_emergence.data.texts import DomainTexts

TOKYO = "東京は日本の首都であり世界最大の都市の一つです"
LOGGER = "moe_emergence.data.near_duplicates"


def document(seed: int, words: int = 80) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(400)}" for _ in range(words))


def accented(seed: int) -> str:
    return document(seed).replace("w", "é")


def edited(text: str, *places: int) -> str:
    words = text.split(" ")
    for place in places:
        words[place] = "changed"
    return " ".join(words)


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, 79), max_size=4)), max_size=12),
    st.sets(st.integers(0, 5), max_size=4),
)
def test_they_are_those_of_a_comparison_of_all_pairs(train, evaluation) -> None:
    train_texts = [edited(document(seed), *places) for seed, places in train]
    eval_texts = [document(seed) for seed in evaluation]
    found = near_duplicates("prose", train_texts, eval_texts)

    def nearest(text: str) -> float:
        ours = set(shingles(text))
        others = [set(shingles(other)) for other in eval_texts]
        return max((len(ours & o) / len(ours | o) for o in others), default=0.0)

    # the index may miss a pair, but not one in a million of those as near as 0.9
    for i, text in enumerate(train_texts):
        assert i not in found or nearest(text) >= SIMILARITY
        assert i in found or nearest(text) < 0.9


@pytest.mark.parametrize(
    ("train", "evaluation", "near"),
    [
        (edited(document(0), 40), document(0), True),
        (document(0).upper().replace(" ", "\n"), document(0), True),
        (unicodedata.normalize("NFD", accented(0) + " more"), accented(0), True),
        (document(1), document(0), False),
        (document(0)[: len(document(0)) // 2], document(0), False),
        ("x = 1", "x = 1 ", True),
        ("x = 1", "x = 2", False),
        (TOKYO * 3 + "。", TOKYO * 3, True),
        ("the sum of 12 and 7", "the sum of 15 and 9", False),
        ("", "", True),
        ("", "a", False),
    ],
)  # fmt: skip
def test_what_is_near(train: str, evaluation: str, near: bool) -> None:
    assert near_duplicates("math", [train], [document(9), evaluation]) == ({0} if near else set())


def test_no_documents_are_near() -> None:
    assert near_duplicates("code", [], [document(0)]) == near_duplicates("code", ["a"], []) == set()


def test_they_are_dropped_or_kept_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    split = Split([document(1), edited(document(0), 9), document(2)], [document(0)], 4)
    with caplog.at_level(logging.INFO, LOGGER):
        dropped = without_near_duplicates("code", split, split.eval, drop=True)
        kept = without_near_duplicates("code", split, split.eval, drop=False)
    assert dropped == Split([document(1), document(2)], split.eval, 4, 1)
    assert kept == dataclasses.replace(split, near_duplicates=1)
    said = [(r.levelname, r.getMessage()) for r in caplog.records]
    what = "code: 1 of 3 training documents are near-duplicates of evaluation documents"
    assert said == [
        ("INFO", f"{what}: dropped"),
        ("WARNING", f"{what}: kept (--near-duplicates drop drops them)"),
    ]


def test_nothing_is_said_of_none(caplog: pytest.LogCaptureFixture) -> None:
    split = Split([document(1)], [document(0)], 0)
    assert without_near_duplicates("code", split, split.eval, drop=True) == split
    assert not [r for r in caplog.records if r.name == LOGGER]


def test_a_domain_that_is_nothing_else_is_refused() -> None:
    split = Split([edited(document(0), 3)], [document(0)], 0)
    with pytest.raises(ValueError, match=r"^prose: every training .* --data, or --near-duplicates"):
        without_near_duplicates("prose", split, split.eval, drop=True)


def test_a_run_does_not_train_on_them(tiny_config: RunConfig, tmp_path: Path) -> None:
    """Every document twice, the second time with another word in the middle."""
    for domain in SHIPPED:
        texts = [document(1000 + i) for i in range(60)]
        lines = [json.dumps({"text": t}) for text in texts for t in (text, edited(text, 40))]
        (tmp_path / f"{domain}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    config = dataclasses.replace(
        tiny_config.data, data=str(tmp_path), cache_dir=str(tmp_path / "cache")
    )
    dropped = prepare_data(config, 0)
    kept = prepare_data(dataclasses.replace(config, near_duplicates="keep"), 0)
    assert (dropped.manifest["near_duplicates"], kept.manifest["near_duplicates"]) == (
        "drop", "keep",
    )  # fmt: skip
    for domain in SHIPPED:
        ours, theirs = dropped.manifest["domains"][domain], kept.manifest["domains"][domain]
        assert ours["near_duplicates"] == theirs["near_duplicates"] > 0
        left_out = theirs["train"]["documents"] - ours["train"]["documents"]
        assert left_out == ours["near_duplicates"]
        assert ours["eval"]["documents"] == theirs["eval"]["documents"] == 10


@pytest.mark.parametrize("keep", ["drop", "keep"])
def test_no_domain_learns_what_another_is_evaluated_on(keep: str) -> None:
    """Documents that several domains share, as they are or edited."""
    rng = random.Random(0)
    sources = {
        domain: DomainTexts(
            [edited(document(i), rng.randrange(80)) for i in range(50 * n, 150)], {}
        )
        for n, domain in enumerate(SHIPPED)
    }
    splits = split_domains(sources, 0, DataConfig(near_duplicates=keep))
    shared = sum(
        bool(near_duplicates(domain, [text], split.eval))
        for domain in SHIPPED
        for split in splits.values()
        for text in splits[domain].train
    )
    assert (shared == 0) == (keep == "drop")
    assert all(split.near_duplicates > 0 for split in splits.values())

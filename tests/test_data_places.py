"""Which domains there are in people's data, and which rows are whose."""

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_emergence.config import DataConfig
from moe_emergence.config.data import RESERVED, check_domain_names, token_classes
from moe_emergence.data import prepare_data
from moe_emergence.data.folder import read_folder
from moe_emergence.data.places import MOST_DOMAINS, find_domains
from moe_emergence.data.token_class import guess_token_class


def texts_of(domain: str, count: int = 12) -> list[str]:
    return [f"{domain} number {i} is a text of {domain}" for i in range(count)]


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_domain(folder: Path, name: str) -> None:
    (folder / f"{name}.jsonl").write_text(jsonl([{"text": t} for t in texts_of(name)]))


def read(path: Path, **options: Any) -> dict[str, list[str]]:
    found = read_folder(str(path), limit_bytes=10**6, seed=0, **options)
    return {domain: sorted(of.texts) for domain, of in found.items()}


def expected(*domains: str) -> dict[str, list[str]]:
    return {domain: sorted(texts_of(domain)) for domain in domains}


def mixed(domains: list[str]) -> list[dict[str, Any]]:
    turns = zip(*(texts_of(domain) for domain in domains), strict=True)
    return [{"text": t, "subset": d} for turn in turns for d, t in zip(domains, turn, strict=True)]


NAMES = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)


@given(names=st.lists(NAMES, min_size=1, max_size=12, unique_by=str.casefold), draw=st.randoms())
@settings(max_examples=25)
def test_a_folder_has_the_domains_it_has_and_gives_those_that_are_chosen(
    names: list[str], draw: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    names = [name for name in names if name not in RESERVED]
    if not names:
        return
    folder = tmp_path_factory.mktemp("data") / "texts"
    folder.mkdir()
    for place, name in enumerate(names):
        if place % 2:
            write_domain(folder, name)
        else:
            (folder / name).mkdir()
            pq.write_table(pa.table({"text": texts_of(name)}), folder / name / "a.parquet")
    assert read(folder) == expected(*sorted(names))
    assert list(read(folder)) == sorted(names)
    chosen = draw.sample(names, draw.randint(1, len(names)))
    assert list(read(folder, domains=chosen)) == chosen


def test_what_is_about_the_data_is_no_domain_and_what_may_be_meant_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("law", "medicine"):
        write_domain(tmp_path, name)
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / "LICENSE").write_text("about")
    (tmp_path / "law.manifest.json").write_text("{}")
    (tmp_path / "notes.csv").write_text("a,b\n")
    (tmp_path / "empty").mkdir()
    for name in ("tokenizer", "runs/one"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path) == expected("law", "medicine")
    assert "empty, law.manifest.json, notes.csv, runs, tokenizer" in caplog.text
    assert "README" not in caplog.text


def test_splits_are_no_domains(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_domain(tmp_path, name)
    with pytest.raises(ValueError, match=r"--data .*test, train are splits.*--domain-field"):
        read(tmp_path)
    assert read(tmp_path, domains=["train"]) == expected("train")


def test_a_folder_without_text_or_with_too_many_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data .*: no domain in it; .*\.jsonl"):
        read(tmp_path)
    for number in range(MOST_DOMAINS + 1):
        write_domain(tmp_path, f"page{number}")
    with pytest.raises(ValueError, match=r"--data .*: 65 files and folders, each a domain"):
        read(tmp_path)


def test_a_single_file_is_one_domain(tmp_path: Path) -> None:
    write_domain(tmp_path, "law")
    assert read(tmp_path / "law.jsonl") == expected("law")
    with pytest.raises(ValueError, match=r"--domains tax: .* is one domain, law"):
        read(tmp_path / "law.jsonl", domains=["tax"])


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "saved", "splits", "folder"])
def test_a_field_tells_the_domains(form: str, tmp_path: Path) -> None:
    rows = mixed(["Pile-CC", "law", "Wikipedia (en)"])
    rows += [{"text": "of no domain", "subset": None}]
    path = tmp_path / f"texts.{form}"
    if form == "jsonl":
        path.write_text(jsonl(rows))
    elif form == "json":
        path.write_text(json.dumps(rows))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "saved":
        Dataset.from_list(rows).save_to_disk(str(path))
    elif form == "splits":
        other = Dataset.from_list([{"text": "for a test", "subset": "held out"}])
        DatasetDict({"train": Dataset.from_list(rows), "test": other}).save_to_disk(str(path))
    else:
        path.mkdir()
        (path / "train-0.jsonl").write_text(jsonl(rows[:9]))
        (path / "train-1.jsonl").write_text(jsonl(rows[9:]))
    assert read(path, domain_field="subset") == expected("Pile-CC", "Wikipedia (en)", "law")
    assert read(path, domain_field="subset", domains=["law"]) == expected("law")
    with pytest.raises(ValueError, match=r"--domains tax: no row of .* has subset = tax"):
        read(path, domain_field="subset", domains=["tax"])
    with pytest.raises(ValueError, match=r"--domain-field topic: .* has subset, text; name one"):
        read(path, domain_field="topic")
    with pytest.raises(ValueError, match=r"no field 'body', only subset, text; .*--text-field"):
        read(path, domain_field="subset", text_field="body")


def test_classes_of_a_saved_data_set_are_told_by_name(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "topic": ClassLabel(names=["law", "tax"])})
    rows = {"text": [*texts_of("law"), *texts_of("tax")], "topic": [0] * 12 + [1] * 12}
    Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "topics"))
    assert read(tmp_path / "topics", domain_field="topic") == expected("law", "tax")


def test_saved_data_sets_can_be_domains_of_a_folder(tmp_path: Path) -> None:
    for name in ("law", "tax"):
        Dataset.from_dict({"text": texts_of(name)}).save_to_disk(str(tmp_path / name))
    assert read(tmp_path) == expected("law", "tax")
    assert read(tmp_path / "law") == expected("law")


def test_a_field_of_many_values_names_no_domains(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "id": i} for i in range(MOST_DOMAINS + 1)]
    (tmp_path / "a.jsonl").write_text(jsonl(rows))
    with pytest.raises(ValueError, match="--domain-field id: it has more than 64 values"):
        find_domains(tmp_path / "a.jsonl", (), "id")


@pytest.mark.parametrize("name", ["a/b", "all", "random", ".a", "-a", "=1", "a=b", " a", "", "$x$"])
def test_names_that_cannot_stand_in_flags_and_files_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="--domains"):
        check_domain_names((name,), "--domains")


def test_configurations_refuse_what_no_source_has() -> None:
    with pytest.raises(ValueError, match="--domains law: --data embedded has code, math, prose"):
        DataConfig(data="embedded", domains=("law", "code"))
    with pytest.raises(ValueError, match="--domains code code: name each domain once"):
        DataConfig(data="embedded", domains=("code", "code"))
    with pytest.raises(ValueError, match=r"--domain-field subset: .*leave it out"):
        DataConfig(data="hub", domain_field="subset")
    with pytest.raises(ValueError, match=r"--token-types law=french: .*python, math, words, none"):
        DataConfig(data="somewhere", token_types=("law=french",))
    assert token_classes(("law=words", "tax=none")) == {"law": "words", "tax": "none"}


@pytest.mark.parametrize(
    ("documents", "token_class"),
    [
        (["import os\n\n\ndef f(x):\n    return x\n"] * 3, "python"),
        (["The court of the state is bound by the law, and it was held that it is."] * 3, "words"),
        (["Tom has 3 + 4 = 7 apples of 12, so 12 - 7 = 5 are left for 5 / 1."] * 3, "math"),
        (["Das Gericht hat entschieden, dass die Klage nicht begründet ist."] * 3, "none"),
        (["import os\n\n\ndef f(x):\n    y = x\n    return (y +"] * 3, "python"),
        (["#ifndef A\n#define A 3\n#include <b.h>\n#endif\n"] * 3, "none"),
        (["int main(void) {\n  int x = 3;\n  return x + 4;\n}\n"] * 3, "none"),
        (["这是一段中文文本。"], "none"),
        ([], "none"),
    ],
)
def test_classes_are_guessed_from_the_text(documents: list[str], token_class: str) -> None:
    assert guess_token_class(documents) == token_class


def test_prepared_data_has_the_chosen_domains_and_their_classes(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("law", "tax", "art"):
        write_domain(folder, name)
    config = DataConfig(
        data=str(folder), domains=("tax", "art"), token_types=("tax=none",), tokenizer="train",
        vocab_size=300, block_size=8, cache_dir=str(tmp_path / "cache"), near_duplicates="keep",
    )  # fmt: skip
    prepared = prepare_data(config, 0)
    assert list(prepared.train_blocks) == list(prepared.eval_blocks) == ["tax", "art"]
    assert prepared.token_classes == {"tax": "none", "art": "words"}
    with pytest.raises(ValueError, match="--token-types law: the domains are tax, art"):
        prepare_data(DataConfig(**vars(config) | {"token_types": ("law=words",)}), 0)

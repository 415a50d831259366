"""Data files as people have them: what is readable is read, and what is not is said."""

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_emergence.data.files import files_below, rows_of, suffix_of
from moe_emergence.data.folder import read_domain
from moe_emergence.data.places import find_domain

TEXTS = [f"text {i} é 中 {'x' * 20}" for i in range(6)]


def lines(texts: list[str], **others: Any) -> bytes:
    rows = [{"text": t, **{k: f(i) for k, f in others.items()}} for i, t in enumerate(texts)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(texts: Any, **columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts, **columns}), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def read(folder: Path, files: dict[str, bytes]) -> list[str]:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    found = find_domain(folder, "code")
    texts = read_domain(found, "code", limit_bytes=10**8, seed=0, text_field="text").texts
    return sorted(texts)


FIRST, SECOND = TEXTS[:3], TEXTS[3:]
NOTHING: Callable[[int], Any] = lambda i: None  # noqa: E731
OTHER_COLUMNS = {
    "null, then text": (lines(FIRST, m=NOTHING), lines(SECOND, m=str)),
    "none, then one": (lines(FIRST), lines(SECOND, m=str)),
    "dates, then text": (lines(FIRST, m=lambda i: "2021-01-01 00:00:00"), lines(SECOND, m=str)),
    "int, then float": (lines(FIRST, m=int), lines(SECOND, m=lambda i: i + 0.5)),
    "numbers beyond 64 bits": (lines(FIRST, m=lambda i: 2**70), lines(SECOND, m=float)),
    "objects with other fields": (lines(FIRST, m=lambda i: {str(i): i}), lines(SECOND, m=str)),
}


@pytest.mark.parametrize("contents", OTHER_COLUMNS.values(), ids=OTHER_COLUMNS)
def test_columns_nobody_asked_for_do_not_matter(contents: Any, tmp_path: Path) -> None:
    first, second = contents
    assert read(tmp_path, {"code/a.jsonl": first, "code/b.jsonl": second}) == sorted(TEXTS)
    both = tmp_path / "both"
    assert read(both, {"code.jsonl": first + second}) == sorted(TEXTS)


PARQUET = {
    "null, then text": (table(FIRST, m=pa.nulls(3)), table(SECOND, m=["u"] * 3)),
    "int32, then int64": (
        table(FIRST, m=pa.array([1] * 3, pa.int32())), table(SECOND, m=pa.array([2**40] * 3)),
    ),
    "none, then one": (table(FIRST), table(SECOND, m=["u"] * 3)),
    "text, then large text": (table(FIRST), table(pa.array(SECOND, pa.large_string()))),
    "a dictionary": (table(pa.array(FIRST).dictionary_encode()), table(SECOND)),
    "no rows": (table(pa.array([], pa.string())), table(TEXTS)),
}  # fmt: skip


@pytest.mark.parametrize("contents", PARQUET.values(), ids=PARQUET)
def test_parquet_of_any_types(contents: Any, tmp_path: Path) -> None:
    first, second = contents
    assert read(tmp_path, {"code/a.parquet": first, "code/b.parquet": second}) == sorted(TEXTS)


@pytest.mark.skipif(not hasattr(pa, "string_view"), reason="pyarrow has views from 16 on")
def test_parquet_of_views(tmp_path: Path) -> None:
    first, second = table(pa.array(FIRST, pa.string_view())), table(SECOND)
    assert read(tmp_path, {"code/a.parquet": first, "code/b.parquet": second}) == sorted(TEXTS)


def test_texts_that_look_like_something_else_are_texts(tmp_path: Path) -> None:
    texts = ["2021-01-01 00:00:00", "12", "null", "true", "1e5", "a\0b", "a\u2028b\x85c"]
    assert read(tmp_path, {"code.jsonl": lines(texts)}) == sorted(texts)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("code.jsonl", b"\xef\xbb\xbf" + lines(TEXTS)),
        ("code.jsonl", lines(TEXTS).replace(b"\n", b"\r\n")),
        ("code.jsonl", b"\n \n" + lines(TEXTS).replace(b"\n", b"\n\n")[:-2]),
        ("code.jsonl", lines(TEXTS).replace(b"\n", b" ")),
        ("code.json", json.dumps([{"text": t} for t in TEXTS], indent=1).encode()),
        ("code.json", b"\xef\xbb\xbf" + json.dumps([{"text": t} for t in TEXTS]).encode()),
        ("code.jsonl.gz", gzip.compress(lines(FIRST)) + gzip.compress(lines(SECOND))),
        ("CODE", None),
    ],
)
def test_forms_of_the_same_rows(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content is None:
        files = {"code/a.jsonl": lines(FIRST), "code/B.JSONL": lines(SECOND)}
    else:
        files = {name: content}
    assert read(tmp_path, files) == sorted(TEXTS)


def test_zstandard_frames_are_all_read_and_a_cut_one_is_not_silent(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    frames = zstandard.compress(b"AAAA\n") + zstandard.compress(b"BBBB\n" * 9000)
    assert read(tmp_path, {"code.txt.zst": frames}) == ["AAAA\n" + "BBBB\n" * 9000]
    with pytest.raises(ValueError, match=r"code.txt.zst: .*EOFError.*last frame"):
        read(tmp_path, {"code.txt.zst": frames[:-3]})


def test_a_byte_order_mark_and_foreign_line_ends_are_no_text(tmp_path: Path) -> None:
    files = {"code/a.txt": b"\xef\xbb\xbfhello", "code/b.txt": b"a\r\nb\rc\n"}
    assert read(tmp_path, files) == ["a\nb\nc\n", "hello"]


def test_linked_folders_are_read_once_and_circles_end(tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()
    (away / "b.jsonl").write_bytes(lines(SECOND))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "more").symlink_to(away)
    (away / "back").symlink_to(tmp_path / "code")
    assert read(tmp_path, {"code/a.jsonl": lines(FIRST)}) == sorted(TEXTS)


def test_what_is_not_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {"code/a.jsonl": lines(TEXTS), "code/b.csv": b"text\n", "code/c/notes.md": b"#",
             "code/._a.jsonl": b"\0", "code/.git/x.jsonl": b"{"}  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path, files) == sorted(TEXTS)
    assert "2 files are not read (.csv, .md)" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines(TEXTS) + b'{"text": "bad \\ud83d"}\n', "surrogates not allowed"),
        (b'["a"]\n["b"]\n', "could not be read"),
        (b"[1, 2]", "a row is int, not an object"),
        (lines(TEXTS) + b"12\n", "a row is int, not an object"),
        (b'{"body": "x"}\n{"title": "y"}\n', "no field 'text', only body"),
        (b'{"text": 3}\n', "field 'text' holds int, no text"),
    ],
)
def test_what_cannot_be_read_names_the_file(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"code.jsonl: domain code.*{message}"):
        read(tmp_path, {"code.jsonl": content})


def test_rows_without_the_field_are_blank_where_others_have_it(tmp_path: Path) -> None:
    content = b'{"note": 1}\n' + lines(TEXTS) + b'{"note": 2}\n'
    assert read(tmp_path, {"code.jsonl": content}) == sorted(TEXTS)


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_any_text_comes_back(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    for escaped in (True, False):
        rows = [json.dumps({"text": t}, ensure_ascii=escaped) for t in texts]
        path.write_bytes("\n".join(rows).encode())
        assert [row["text"] for row in rows_of(path, "json", "text", longest=1000)] == texts


def test_suffixes() -> None:
    assert suffix_of("a.JSONL.GZ") == ".jsonl.gz"
    assert suffix_of("a.csv") == ""
    assert files_below(Path("/nowhere/at/all")) == ([], [])

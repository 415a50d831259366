import bz2
import gzip
import json
import lzma
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_emergence.data.folder import read_folder

DOCUMENTS = {
    domain: [f"{domain} document {i}\n\nwith é and {'x' * i}" for i in range(30)]
    for domain in ("code", "math", "prose")
}


def jsonl(texts: list[str], field: str = "text") -> bytes:
    rows = [{field: text, "number": i} for i, text in enumerate(texts)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# equal bytes at any time: they are in the tests' names, which all workers have to agree on
gzipped = partial(gzip.compress, mtime=0)


def parquet(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"text": pa.array(texts, pa.string()), "n": range(len(texts))}), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data [1]*"  # not a pattern, but a folder of this name
    path.mkdir()
    for domain, texts in DOCUMENTS.items():
        (path / f"{domain}.jsonl").write_bytes(jsonl(texts))
    return path


def read(folder: Path, limit: int = 10**6, seed: int = 0, field: str = "text", **options):
    return read_folder(str(folder), limit_bytes=limit, seed=seed, text_field=field, **options)


def replace_code(folder: Path, name: str, content: bytes) -> Path:
    (folder / "code.jsonl").unlink()
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def refused(folder: Path, message: str, **options) -> str:
    with pytest.raises(ValueError, match=message) as raised:
        read(folder, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("code.jsonl", jsonl(DOCUMENTS["code"])),
        ("code.jsonl.gz", gzipped(jsonl(DOCUMENTS["code"]))),
        ("code.jsonl.xz", lzma.compress(jsonl(DOCUMENTS["code"]))),
        ("code.jsonl.bz2", bz2.compress(jsonl(DOCUMENTS["code"]))),
        ("code.json", json.dumps([{"text": t} for t in DOCUMENTS["code"]]).encode()),
        ("code/part.jsonl", jsonl(DOCUMENTS["code"])),
    ],
)
def test_every_format_gives_the_same_documents(folder: Path, name: str, content: bytes) -> None:
    path = replace_code(folder, name, content)
    found = read(folder)
    for domain, texts in DOCUMENTS.items():
        assert sorted(found[domain].texts) == sorted(texts)
    place = path if path.parent == folder else path.parent
    assert found["code"].source == {
        "source": "folder",
        "path": str(place),
        "files": 1,
        "bytes": len(content),
    }


def test_zstandard_works_or_says_what_to_install(folder: Path) -> None:
    try:
        import zstandard
    except ImportError:
        replace_code(folder, "code.jsonl.zst", b"\x28\xb5\x2f\xfd\x00\x00")
        refused(folder, r"code.jsonl.zst: domain code.*zst")
        return
    replace_code(folder, "code.jsonl.zst", zstandard.compress(jsonl(DOCUMENTS["code"])))
    assert sorted(read(folder)["code"].texts) == sorted(DOCUMENTS["code"])


@pytest.mark.slow
def test_parquet_in_a_sub_folder(folder: Path) -> None:
    (folder / "code.jsonl").unlink()
    (folder / "code").mkdir()
    parquet(folder / "code" / "a.parquet", DOCUMENTS["code"][:10])
    parquet(folder / "code" / "b.parquet", DOCUMENTS["code"][10:])
    parquet(folder / "code" / "none.parquet", [])
    assert sorted(read(folder)["code"].texts) == sorted(DOCUMENTS["code"])


def test_text_files_are_one_document_each_in_any_depth(folder: Path) -> None:
    (folder / "code.jsonl").unlink()
    for i, text in enumerate(DOCUMENTS["code"]):
        path = folder / "code" / f"d{i % 3}" / f"file [{i}].txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "code" / ".hidden.txt").write_text("hidden")
    (folder / "code" / "notes.md").write_text("not a text file")
    for domain in ("math", "prose"):
        (folder / f"{domain}.jsonl").write_bytes(jsonl(DOCUMENTS[domain], "content"))
    found = read(folder, field="content")["code"]  # a field name does not concern text files
    assert sorted(found.texts) == sorted(DOCUMENTS["code"])


def test_many_text_files_are_read_in_little_time(folder: Path) -> None:
    (folder / "code.jsonl").unlink()
    (folder / "code").mkdir()
    for i in range(1000):
        (folder / "code" / f"{i}.txt").write_text(f"text {i}")
    start = time.perf_counter()
    assert len(read(folder)["code"].texts) == 1000
    assert time.perf_counter() - start < 5


def test_other_files_beside_the_data_do_not_matter(folder: Path) -> None:
    (folder / "code.manifest.json").write_text("{}")
    (folder / "README.md").write_text("about")
    (folder / ".hidden.jsonl").write_text("{}")
    found = read(folder)
    assert list(found) == list(DOCUMENTS)
    assert sorted(found["code"].texts) == sorted(DOCUMENTS["code"])


def test_sorted_files_are_shuffled_by_the_seed(folder: Path) -> None:
    first, again, other = (read(folder, limit=300, seed=s)["code"].texts for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert first != DOCUMENTS["code"][: len(first)]
    assert sum(len(t.encode()) for t in first) <= 300


def test_the_field_is_chosen_and_null_is_blank(folder: Path) -> None:
    rows = [{"body": "one"}, {"body": None}, {"body": "two"}]
    content = "\n".join(map(json.dumps, rows)).encode()
    for domain in DOCUMENTS:
        (folder / f"{domain}.jsonl").write_bytes(content)
    assert sorted(read(folder, field="body")["code"].texts) == ["one", "two"]


def test_a_wrong_field_names_domain_file_fields_and_flag(folder: Path) -> None:
    message = refused(
        folder,
        r"domain code: no field 'content', only number, text; .*--text-field",
        field="content",
    )
    assert "code.jsonl" in message


@pytest.mark.parametrize("value", [5, ["a"], {"a": 1}])
def test_a_field_without_text_is_refused(folder: Path, value: object) -> None:
    (folder / "math.jsonl").write_text(json.dumps({"text": value}) + "\n")
    refused(folder, r"math.jsonl: domain math: field 'text' holds \w+, no text.*--text-field")


def test_a_missing_folder_or_domain_is_named(folder: Path) -> None:
    refused(folder / "none", r'--data .*none: no such file or folder; give "embedded", "hub"')
    (folder / "math.jsonl").rename(folder / "math.csv")
    message = r"--data .*nothing for domain math \(found math.csv.*\.jsonl"
    refused(folder, message, domains=("code", "math"))
    (folder / "math.csv").unlink()
    message = r"--data .*: nothing for domain math; add a folder math/ or a file math"
    refused(folder, message, domains=("math",))


@pytest.mark.parametrize("second", ["code.parquet", "code.json", "code.jsonl.xz", "code/"])
def test_two_candidates_for_a_domain_are_refused(folder: Path, second: str) -> None:
    path = folder / second
    path.mkdir() if second.endswith("/") else path.write_bytes(b"x")
    refused(folder, r"--data .*: 2 candidates for domain code \(code.*, code.*\); keep one")


def test_a_sub_folder_must_hold_one_format(folder: Path) -> None:
    replace_code(folder, "code/a.jsonl", jsonl(["a"]))
    (folder / "code" / "b.txt").write_text("b")
    refused(folder, r"--data .*/code: domain code mixes json and text files; keep one format")
    (folder / "code" / "b.txt").unlink()
    (folder / "code" / "a.jsonl").unlink()
    message = r"--data .*/code: no file with text for code; add .jsonl"
    refused(folder, message, domains=("code",))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("code.jsonl", b""),
        ("code.jsonl", b"\n\n"),
        ("code.jsonl.gz", gzipped(b"")),
        ("code.jsonl.xz", lzma.compress(b"")),
        ("code.json", b"[]"),
        ("code/a.txt", b""),
        ("code.parquet", None),
    ],
)
def test_an_empty_file_is_refused(folder: Path, name: str, content: bytes | None) -> None:
    path = replace_code(folder, name, content or b"")
    if content is None:
        parquet(path, [])
    refused(folder, r"--data .*code.*: domain code: the file is empty(;|, or) ")


def test_an_empty_part_does_not_end_reading(folder: Path) -> None:
    replace_code(folder, "code/a.jsonl.gz", gzipped(b""))
    (folder / "code" / "b.jsonl.gz").write_bytes(gzipped(jsonl(DOCUMENTS["code"])))
    (folder / "code" / "c.jsonl.gz").write_bytes(gzipped(b""))
    for seed in range(4):
        assert len(read(folder, seed=seed)["code"].texts) == len(DOCUMENTS["code"])


LONG = jsonl(DOCUMENTS["code"] * 20)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("code.jsonl", b"{not json\n" * 4),
        ("code.jsonl", jsonl(DOCUMENTS["code"])[:-20]),
        ("code.jsonl", '{"text": "café"}\n'.encode("latin-1")),
        ("code.jsonl", b'{"text": "a \\ud800 b"}\n'),
        ("code.jsonl", b"5\n6\n"),
        ("code.json", b'[{"text": "a"}, {"te'),
        ("code.jsonl.xz", lzma.compress(LONG)[:-40]),
        ("code.jsonl.xz", lzma.compress(LONG)[:200] + b"\0" * 200),
        ("code.jsonl.xz", b"junk" * 50),
        ("code.jsonl.gz", gzipped(LONG)[:-40]),
        ("code.jsonl.gz", gzipped(LONG)[:200] + b"\0" * 200),
        ("code.jsonl.gz", b"junk" * 50),
        ("code.jsonl.bz2", bz2.compress(LONG)[:-40]),
        ("code.jsonl.bz2", b"junk" * 50),
        ("code.parquet", b"PAR1 and no more"),
        ("code/a.txt", "café".encode("latin-1")),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(folder: Path, name: str, content: bytes) -> None:
    replace_code(folder, name, content)
    message = refused(folder, r"--data .*: domain code could not be read \(\w+.*; (replace|save)")
    assert str(folder / Path(name).parts[0]) in message

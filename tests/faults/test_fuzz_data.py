"""Data folders of any content are read or refused in one line, in bounded memory and time."""

import bz2
import gzip
import io
import json
import lzma
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import command_environment
from hypothesis import event, example, given
from hypothesis import strategies as st
from mutated import changed, is_sentence, json_files, often, spoilt

from moe_emergence.data.files import longest_row
from moe_emergence.data.folder import read_folder
from moe_emergence.data.split import split_texts

zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")

LIMIT = 20_000
DOCUMENTS = [f"document {i} é 中 \U0001f600 {'x' * i}" for i in range(12)]
ROWS = [{"text": text, "n": i, "of": "ab"[i % 2]} for i, text in enumerate(DOCUMENTS)]
PACKED = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
NAMES = st.sampled_from(["code", "code/a", "code/b", "math"]) | st.sampled_from(
    ["code", "math", "code/a", "code/b", "code/c/d", "-x", "--help", "a b", "a\nb", "é", "e\u0301",
     "._code", ".DS_Store", ".git/x", "all", "none", "x" * 100, "train", "test", "README", "a=b",
     "code.jsonl", "\udcff", "config"]
)  # fmt: skip
SUFFIXES = st.sampled_from([".jsonl", ".json", ".txt", ".parquet"]) | st.sampled_from(
    [".jsonl", ".json", ".txt", ".parquet", ".csv", ".arrow", ".JSONL", "", ".jsonl.gz.gz"]
)


def table(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


PARQUET = table(ROWS)


@st.composite
def contents(draw: st.DrawFn, suffix: str) -> bytes:
    """Bytes of a file that is what its suffix says, or nearly so."""
    rows = draw(st.just(ROWS) | st.just(ROWS) | changed(ROWS, most=3))
    rows = rows if isinstance(rows, list) else [rows]
    lowered = suffix.lower()
    if lowered.startswith(".parquet"):
        data = PARQUET
    elif lowered.startswith(".json") and not lowered.startswith(".jsonl") and draw(st.booleans()):
        data = json.dumps(rows, indent=draw(st.sampled_from([None, 1]))).encode(errors="replace")
    elif lowered.startswith(".json"):
        ends = draw(st.sampled_from(["\n", "\r\n", "\n\n", " ", "\r"]))
        escaped = draw(st.booleans())
        data = ends.join(json.dumps(row, ensure_ascii=escaped) for row in rows).encode(
            draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16", "latin-1", "utf-8-sig"])),
            errors="replace",
        )
    else:
        data = "\n".join(DOCUMENTS).encode()
    return draw(spoilt(data)) if draw(st.integers(0, 4)) == 0 else data


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes | str]:
    """A name and its content, or what else there is in its place."""
    name = draw(NAMES)
    kind = draw(
        st.sampled_from(["file"] * 14 + ["pipe", "socket", "device", "link", "loop", "nowhere"])
    )
    suffix = draw(SUFFIXES)
    if kind != "file":
        return name + suffix, kind
    data = draw(contents(suffix))
    packing = draw(st.sampled_from([*PACKED, "", "", "", ""]))
    data = PACKED[packing](data)
    if packing and draw(st.integers(0, 3)) == 0:
        data = draw(spoilt(data))
    return name + suffix + packing, data


def put(folder: Path, name: str, content: bytes | str) -> None:
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:  # a file is in its place
        return
    if os.path.lexists(path):
        return
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "pipe":
        os.mkfifo(path)
    elif content == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the whole path may be longer than a socket's may be
        try:
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(path.name)
        finally:
            os.chdir(here)
    else:
        targets = {"device": "/dev/zero", "link": __file__, "loop": folder, "nowhere": "nowhere"}
        path.symlink_to(targets[content])


def read(path: Path, **options: Any) -> dict[str, list[str]]:
    found = read_folder(str(path), limit_bytes=LIMIT, seed=0, **options)
    return {name: domain.texts for name, domain in found.items()}


OPTIONS = st.just({}) | st.fixed_dictionaries(
    {},
    optional={
        "domains": st.lists(st.sampled_from(["code", "math", "a", "é", "x"]), max_size=2).map(
            tuple
        ),
        "domain_field": st.sampled_from(["of", "n", "text", "", "none"]),
        "text_field": st.sampled_from(["text", "n", "of", "", "\n"]),
    },
)


@often(100, 500)
@given(entries=st.lists(files(), max_size=4), options=OPTIONS, single=st.booleans())
@example(entries=[("code.jsonl", "pipe")], options={}, single=True)
@example(entries=[("code/a.jsonl", "device")], options={}, single=False)
@example(entries=[("code.jsonl", b"[" * 10**5)], options={}, single=False)
@example(entries=[("code.jsonl", b'{"text": "a", "n": ' + b"[" * 10**5)], options={}, single=False)
@example(
    entries=[("code.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n")],
    options={},
    single=False,
)
@example(entries=[("code.txt.xz", b"")], options={}, single=False)
def test_fuzz_data_folders(
    entries: list[tuple[str, bytes | str]],
    options: dict[str, Any],
    single: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Every text that is read is one that a split, a hash and a JSON file can hold."""
    folder = tmp_path_factory.mktemp("fuzz") / "data"
    folder.mkdir()
    for name, content in entries:
        put(folder, name, content)
    path = folder / entries[0][0] if single and entries else folder
    try:
        found = read(path, **options)
        event("read")
        for name, texts in found.items():
            assert sum(len(text.encode()) for text in texts) <= LIMIT
            assert all(text.strip() for text in texts)
            json.dumps({name: texts}, ensure_ascii=False).encode()
            split_texts(name, texts, seed=0)
    except ValueError as error:
        event("refused")
        said = " ".join(str(error).split())
        assert is_sentence(said) or "distinct documents" in said, said


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a data set as `save_to_disk` writes them."""
    import datasets

    folder = tmp_path_factory.mktemp("saved") / "code"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@often(30, 200)
@given(data=st.data())
def test_fuzz_saved_data_sets(
    data: st.DataObject, saved: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One file of a data set that `datasets` saved is damaged."""
    folder = tmp_path_factory.mktemp("fuzz") / "code"
    folder.mkdir()
    bad = data.draw(st.sampled_from(sorted(saved)))
    for name, content in saved.items():
        if name == bad:
            is_json = name.endswith(".json")
            content = data.draw(json_files(json.loads(content)) if is_json else spoilt(content))
        (folder / name).write_bytes(content)
    try:
        read(folder)
        event("read")
    except ValueError as error:
        event("refused")
        said = str(error)
        assert is_sentence(said), said


READ = """
import json, sys
from pathlib import Path
import datasets, pyarrow
from moe_emergence.data.files import longest_row
from moe_emergence.data.folder import read_folder

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024

for folder in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    try:
        found = read_folder(folder, limit_bytes=1_000_000, seed=0)
        said = [len(one.texts) for one in found.values()]
    except ValueError as error:
        said = str(error)
    print(json.dumps([said, peak() - before]))
"""
MB = 10**6
GIANTS = {
    "a line without an end": ("code.jsonl", b"x" * MB, 40),
    "a text without an end": ("code.txt", b"x" * MB, 40),
    "a list in a list in a list": ("code.json", b"[" * MB, 40),
    "a list of one long text": ("code.json", b'[{"text": "' + b"x" * 40 * MB, 1),
    "an archive of spaces": ("code.jsonl.gz", b" " * MB, 100),
    "an archive of one text": ("code.txt.xz", b"a" * MB, 60),
    "a block of one byte": ("code.txt.bz2", b"a" * 40 * MB, 1),
    "an archive of empty lines": ("code.jsonl.bz2", b"\n" * MB, 100),
    "frames of zeros": ("code.txt.zst", b"\0" * 50 * MB, 4),
    "an archive of one row": ("code.jsonl.zst", b'{"text": "the same"}\n' * 50_000, 70),
}
"""File, what a member of it unpacks to, and how often that is there."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")
def test_fuzz_giants_fit_into_memory(tmp_path: Path) -> None:
    """A row of 20 MB, as `longest_row` allows, may be there as bytes and as text, in two copies."""
    folders = []
    for number, (name, piece, times) in enumerate(GIANTS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        packing = Path(name).suffix if Path(name).suffix in PACKED else ""
        member = PACKED[packing](piece)
        with (folder / name).open("wb") as file:
            file.writelines(member for _ in range(times))
        folders.append(str(folder))
    done = subprocess.run(
        [sys.executable, "-c", READ, *folders],
        env=command_environment(), capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    for giant, line in zip(GIANTS, done.stdout.splitlines(), strict=True):
        said, used = json.loads(line)
        assert used < 4 * longest_row(MB) / 2**20, (giant, said, used)
        assert isinstance(said, list) or is_sentence(said), (giant, said)

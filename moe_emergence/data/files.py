"""Local data files: the text of every row, and nothing else of a file that could be wrong.

`datasets` infers the type of every column from the first rows, and refuses a file over a column
that nobody asked for.
"""

import bz2
import gzip
import io
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

from moe_emergence.data.streams import Row

FileFormat: TypeAlias = Literal["json", "parquet", "text", "saved"]

COMPRESSED = ("", ".gz", ".xz", ".bz2", ".zst")
SUFFIXES: dict[str, FileFormat] = {
    ".parquet": "parquet",
    **{f".jsonl{c}": "json" for c in COMPRESSED},
    **{f".json{c}": "json" for c in COMPRESSED},
    **{f".txt{c}": "text" for c in COMPRESSED},
}
READABLE = ".jsonl, .json, .txt (also .gz, .xz, .bz2, .zst) or .parquet"


def suffix_of(name: str) -> str:
    """The known suffix a file name ends with, in any case, or an empty string."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def files_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """Readable files below a folder, linked folders included, and those that are not; sorted.

    Hidden files and folders are left out of both.
    """
    readable: list[Path] = []
    others: list[Path] = []
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(place)
        if here in seen:  # a link into what it lies in
            folders.clear()
            continue
        seen.add(here)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                (readable if suffix_of(name) else others).append(Path(place, name))
    return sorted(readable), sorted(others)


def is_saved(path: Path) -> bool:
    """Whether `datasets` saved a data set in this folder (`save_to_disk`)."""
    return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()


def is_saved_splits(path: Path) -> bool:
    """Whether it saved a dictionary of them there: sub-folders, named for splits."""
    return (path / "dataset_dict.json").is_file()


def rows_of(path: Path, form: FileFormat, field: str, *others: str) -> Iterator[Row]:
    """Rows of one file, or saved data set, that have at least `field`, where any of its rows has
    it, and what they have of `others`.

    A text file is one row with the field "text"; line ends are those of Unix and a byte order mark
    is no text. Raises what its libraries raise for a damaged file.
    """
    if form == "parquet":
        yield from _parquet_rows(path, field, others)
        return
    if form == "saved":
        yield from _saved_rows(path, field, others)
        return
    with _opened(path) as stream:
        if form == "text":
            yield {"text": io.TextIOWrapper(stream, encoding="utf-8-sig").read()}
            return
        first, found = None, False
        for row in _json_rows(stream):
            found = found or field in row
            first = first or row
            yield row if field in row else {**row, field: None}
        if first is not None and not found:
            yield first  # for its names


def _json_rows(stream: IO[bytes]) -> Iterator[Row]:
    """Objects one after another, or in one list."""
    decoder, is_first = json.JSONDecoder(), True
    for line in stream:
        text = line.decode("utf-8-sig" if is_first else "utf-8").strip()
        if is_first and text.startswith("["):
            rows = json.loads(text + stream.read().decode("utf-8"))
            yield from map(_checked, rows)
            return
        is_first = is_first and not text
        while text:
            row, end = decoder.raw_decode(text)
            yield _checked(row)
            text = text[end:].lstrip()


def _checked(row: object) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"a row is {type(row).__name__}, not an object with fields")
    return row


def _saved_rows(path: Path, field: str, others: tuple[str, ...]) -> Iterator[Row]:
    from datasets import load_from_disk

    found = load_from_disk(str(path))
    if field not in found.column_names and len(found):
        yield dict.fromkeys(found.column_names)
        return
    columns = [name for name in (field, *others) if name in found.column_names]
    # a class has a number in the file and its name beside it
    names = {c: f.int2str for c in columns if hasattr(f := found.features[c], "int2str")}
    for batch in found.select_columns(columns).with_format(None).iter(batch_size=1024):
        for values in zip(*(batch[c] for c in columns), strict=True):
            row = dict(zip(columns, values, strict=True))
            yield row | {c: to(row[c]) for c, to in names.items() if row[c] is not None}


def _parquet_rows(path: Path, field: str, others: tuple[str, ...]) -> Iterator[Row]:
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    names = file.schema_arrow.names
    if field not in names and file.metadata.num_rows:
        yield dict.fromkeys(names)
        return
    columns = [name for name in (field, *others) if name in names]
    for batch in file.iter_batches(batch_size=1024, columns=columns):
        yield from batch.to_pylist()


def _opened(path: Path) -> Any:
    """The file's bytes as a context manager, decompressed."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path)
    if suffix == ".bz2":
        return bz2.open(path)
    if suffix == ".xz":
        return lzma.open(path)
    if suffix == ".zst":
        return io.BufferedReader(_Zstandard(path))
    return path.open("rb")


class _Zstandard(io.RawIOBase):
    """All frames of a file; one that ends too early is an `EOFError`, as with other formats."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._new = zstandard.ZstdDecompressor().decompressobj
        self._file = path.open("rb")
        self._object: Any = None
        self._left = self._ready = b""

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as there is something at once; 0 at the end."""
        while not self._ready:
            data = self._left or self._file.read(2**16)
            self._left = b""
            if not data:
                if self._object is not None:
                    raise EOFError("Compressed file ended before the end of its last frame")
                return 0
            if self._object is None:
                self._object = self._new()
            self._ready = self._object.decompress(data)
            if self._object.eof:
                self._left, self._object = self._object.unused_data, None
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)

    def close(self) -> None:
        """And the file under it."""
        self._file.close()
        super().close()

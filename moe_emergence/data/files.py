"""Local data files: the text of every row, and nothing else of a file that could be wrong.

`datasets` infers the type of every column from the first rows, and refuses a file over a column
that nobody asked for.
"""

import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias

from moe_emergence.data.compressed import COMPRESSED, opened
from moe_emergence.data.json_rows import json_rows
from moe_emergence.data.streams import Row
from moe_emergence.hub_access import reason

logger = logging.getLogger(__name__)

FileFormat: TypeAlias = Literal["json", "parquet", "text", "saved"]

SUFFIXES: dict[str, FileFormat] = {
    ".parquet": "parquet",
    **{f".jsonl{c}": "json" for c in COMPRESSED},
    **{f".json{c}": "json" for c in COMPRESSED},
    **{f".txt{c}": "text" for c in COMPRESSED},
}
READABLE = ".jsonl, .json, .txt (also .gz, .xz, .bz2, .zst) or .parquet"


def longest_row(limit_bytes: int) -> int:
    """Bytes of a line or a text file that are worth reading for `limit_bytes` of text.

    A text may be half as long as the limit, and JSON may write a byte of it as six.
    """
    return 4 * limit_bytes + 2**24


def suffix_of(name: str) -> str:
    """The known suffix a file name ends with, in any case, or an empty string."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def files_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """Readable files below a folder, linked folders included, and those that are not; sorted.

    Hidden files and folders are left out of both. Pipes, devices and links to nowhere cannot be
    read, nor can folders that may not be opened.
    """
    readable: list[Path] = []
    others: list[Path] = []
    seen = set()

    def refused(error: OSError) -> None:
        if folder.is_dir():
            others.append(Path(error.filename))

    for place, folders, names in os.walk(folder, onerror=refused, followlinks=True):
        here = os.path.realpath(place)
        if here in seen:  # a link into what it lies in
            folders.clear()
            continue
        seen.add(here)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                path = Path(place, name)
                (readable if suffix_of(name) and path.is_file() else others).append(path)
    return sorted(readable), sorted(others)


def is_saved(path: Path) -> bool:
    """Whether `datasets` saved a data set in this folder (`save_to_disk`)."""
    return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()


def is_saved_splits(path: Path) -> bool:
    """Whether it saved a dictionary of them there: sub-folders, named for splits."""
    return (path / "dataset_dict.json").is_file()


def rows_of(path: Path, form: FileFormat, field: str, *others: str, longest: int) -> Iterator[Row]:
    """Rows of one file, or saved data set, that have at least `field`, where any of its rows has
    it, and what they have of `others`.

    A text file is one row with the field "text"; line ends are those of Unix and a byte order mark
    is no text. Lines, and text files, of more than `longest` bytes are passed over with a warning.
    Raises what its libraries raise for a damaged file.
    """
    if form == "parquet":
        yield from _parquet_rows(path, field, others)
        return
    if form == "saved":
        yield from _saved_rows(path, field, others)
        return
    with opened(path) as stream:
        if form == "text":
            content = stream.read(longest + 1)
            if len(content) > longest:
                size = f"{longest / 1e6:,.0f} MB"
                logger.warning("%s: passed over, it is longer than %s", path, size)
                return
            yield {"text": io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()}
            return
        first, found = None, False
        for row in json_rows(stream, longest, str(path)):
            found = found or field in row
            first = first or row
            yield row if field in row else {**row, field: None}
        if first is not None and not found:
            yield first  # for its names


def _saved_rows(path: Path, field: str, others: tuple[str, ...]) -> Iterator[Row]:
    from datasets import load_from_disk

    try:
        found = load_from_disk(str(path))
    except Exception as error:  # damaged files fail in as many ways as there are fields in them
        raise ValueError(f"no data set, {reason(error)}") from error
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

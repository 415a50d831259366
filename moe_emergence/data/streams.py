"""Rows of data files as a stream, read by `datasets` and with its failures made one line.

The readers of `datasets.io` stand behind `datasets.load_dataset`. They are used directly because
`load_dataset` reports every call to a download counter, which waits for the network even for
local files, and stores the description of a hub dataset in the home folder whatever `cache_dir` is.
"""

import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeAlias

from moe_emergence.hub_access import http_error_type, reason

Format: TypeAlias = Literal["json", "parquet"]
Row: TypeAlias = dict[str, Any]


def matching_files(pattern: str) -> Any:
    """Files that match a local or `hf://` pattern, sorted; `FileNotFoundError` if none does."""
    from datasets.data_files import DataFilesDict

    files = DataFilesDict.from_patterns({"train": [pattern]})
    if not files.get("train"):
        raise FileNotFoundError(pattern)
    return files


def open_stream(form: Format, files: Any, cache_dir: str) -> Any:
    """A `datasets.IterableDataset` over `files`."""
    from datasets.io.json import JsonDatasetReader
    from datasets.io.parquet import ParquetDatasetReader

    common = {"split": "train", "cache_dir": cache_dir, "streaming": True}
    if form == "json":
        return JsonDatasetReader(files, **common).read()
    return ParquetDatasetReader(files, **common).read()


def read_errors() -> tuple[type[Exception], ...]:
    """What reading a damaged file or a hub that went away can raise.

    Errors of `pyarrow` extend ValueError, TypeError, LookupError or NotImplementedError.
    """
    from datasets.exceptions import DatasetsError

    return (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        LookupError,
        NotImplementedError,
        ImportError,
        lzma.LZMAError,
        zlib.error,
        DatasetsError,
        http_error_type(),
    )


def stream_rows(
    make: Callable[[], Iterable[Row]], explain: Callable[[Exception], str]
) -> Iterator[Row]:
    """Rows of the stream that `make` opens; what fails on the way is a `ValueError`.

    `explain` turns the error into its message. A stream without rows yields nothing.
    """
    failures = read_errors()
    try:
        rows = iter(make())
    except StopIteration:  # how `datasets` says that files to infer fields from hold no row
        return
    except failures as error:
        raise ValueError(explain(error)) from error
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except failures as error:
            raise ValueError(explain(error)) from error
        yield row


def unreadable(where: str, error: Exception) -> str:
    """The sentence for what reading at `where` raised."""
    is_encoding = isinstance(error, UnicodeError) or "not UTF-8" in str(error)
    change = "save it in UTF-8" if is_encoding else "replace the damaged file"
    return f"{where} could not be read ({reason(error)}); {change}"


def text_of(row: Row, field: str, where: str, change: str) -> str:
    """The text in `field` of a row; null counts as blank.

    Raises `ValueError` naming `where`, the fields there are and `change`, what to change.
    """
    if field not in row:
        raise ValueError(f"{where}: no field {field!r}, only {', '.join(sorted(row))}; {change}")
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: field {field!r} holds {type(value).__name__}, no text; {change}"
        )
    return value

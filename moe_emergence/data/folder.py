"""A data folder: one file or one sub-folder per domain, in any of the usual formats.

Files may be sorted, by package or by author, so documents pass through a seeded shuffle buffer
before the first `size_mb` of them are taken.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_emergence.config import DOMAINS
from moe_emergence.data.streams import (
    Format,
    Row,
    local_files,
    open_stream,
    stream_rows,
    text_of,
)
from moe_emergence.data.texts import DomainTexts, take_texts
from moe_emergence.hub_access import reason
from moe_emergence.settings import check

SHUFFLE_BUFFER = 10_000
COMPRESSED = ("", ".gz", ".xz", ".bz2", ".zst")
SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    **{f".jsonl{c}": "json" for c in COMPRESSED},
    **{f".json{c}": "json" for c in COMPRESSED},
    **{f".txt{c}": "text" for c in COMPRESSED},
}
READABLE = ".jsonl, .json, .txt (also .gz, .xz, .bz2, .zst) or .parquet"


@dataclass(frozen=True)
class DomainFiles:
    """The file or sub-folder of a domain, the files in it and their common format."""

    path: Path
    files: tuple[Path, ...]
    form: Format


def find_domain(folder: Path, domain: str) -> DomainFiles:
    """The files of one domain in a data folder; `ValueError` if there is not exactly one place."""
    candidates = sorted(
        entry
        for entry in folder.iterdir()
        if (entry.name == domain and entry.is_dir())
        or (entry.is_file() and entry.name.removeprefix(domain) in SUFFIXES)
    )
    names = ", ".join(entry.name for entry in candidates)
    check(
        len(candidates) < 2,
        "--data",
        folder,
        f"{len(candidates)} candidates for domain {domain} ({names}); keep one",
    )
    if not candidates:
        others = sorted(e.name for e in folder.iterdir() if e.name.startswith(f"{domain}."))
        found = f" (found {', '.join(others)}, which is not readable)" if others else ""
        check(
            False,
            "--data",
            folder,
            f"nothing for domain {domain}{found}; add a folder {domain}/ or a file {domain} "
            f"with a suffix from {READABLE}",
        )
    path = candidates[0]
    files = [path] if path.is_file() else sorted(readable_files(path))
    check(bool(files), "--data", path, f"no file with text for {domain}; add {READABLE}")
    empty = [str(file) for file in files if file.stat().st_size == 0]
    check(
        not empty,
        "--data",
        ", ".join(empty[:3]),
        f"domain {domain}: the file is empty; remove it or put text in it",
    )
    forms = sorted({SUFFIXES[suffix_of(file.name)] for file in files})
    check(
        len(forms) == 1,
        "--data",
        path,
        f"domain {domain} mixes {' and '.join(forms)} files; keep one format",
    )
    return DomainFiles(path, tuple(files), forms[0])


def suffix_of(name: str) -> str:
    """The known suffix a file name ends with, or an empty string."""
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def readable_files(folder: Path) -> Iterator[Path]:
    """Files below a folder with a known suffix, hidden ones left out."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and suffix_of(path.name):
            yield path


def has_rows(file: Path, form: Format) -> bool:
    """False for a parquet file without rows, which `datasets` refuses to stream."""
    if form != "parquet":
        return True
    from pyarrow import parquet

    return bool(parquet.read_metadata(file).num_rows)


def read_domain(
    found: DomainFiles, domain: str, *, limit_bytes: int, seed: int, text_field: str, cache_dir: str
) -> DomainTexts:
    """Texts of one domain; `ValueError` names the domain, the file and what to change."""
    where = f"--data {found.path}: domain {domain}"
    field = "text" if found.form == "text" else text_field

    def explain(error: Exception) -> str:
        if isinstance(error, ImportError):
            return f"{where}: {reason(error)}; install it or give the file uncompressed"
        return f"{where} could not be read ({reason(error)}); replace the damaged file"

    def rows() -> Iterable[Row]:
        files = [str(file) for file in found.files if has_rows(file, found.form)]
        if not files:
            return ()
        stream = open_stream(found.form, local_files(files), cache_dir)
        shuffled: Iterable[Row] = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        return shuffled

    change = "name the field with the text with --text-field"
    stream = stream_rows(rows, explain)
    first = next(stream, None)
    if first is None:
        raise ValueError(f"{where}: the file is empty; put text in it")
    texts = (text_of(row, field, where, change) for row in itertools.chain((first,), stream))
    taken = take_texts(domain, texts, limit_bytes)
    source = {
        "source": "folder",
        "path": str(found.path),
        "files": len(found.files),
        "bytes": sum(file.stat().st_size for file in found.files),
    }
    return DomainTexts(taken, source)


def read_folder(
    path: str, *, limit_bytes: int, seed: int, text_field: str, cache_dir: str
) -> dict[str, DomainTexts]:
    """Texts of every domain in a data folder, up to `limit_bytes` bytes of UTF-8 each.

    Raises `ValueError` naming the file, the domain and the flag for anything that is missing,
    double, empty, damaged or lacks the text field.
    """
    folder = Path(path)
    check(
        folder.is_dir(),
        "--data",
        path,
        'no such folder; give "embedded", "hub" or a folder with code, math and prose',
    )
    found = {domain: find_domain(folder, domain) for domain in DOMAINS}
    return {
        domain: read_domain(
            found[domain],
            domain,
            limit_bytes=limit_bytes,
            seed=seed,
            text_field=text_field,
            cache_dir=cache_dir,
        )
        for domain in DOMAINS
    }

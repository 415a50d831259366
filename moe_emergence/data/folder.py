"""A data folder: one file or one sub-folder per domain, in any of the usual formats.

Files may be sorted, by package or by author, so documents pass through a seeded shuffle buffer
before the first `size_mb` of them are taken.
"""

import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_emergence.config import DOMAINS
from moe_emergence.data.files import (
    READABLE,
    SUFFIXES,
    FileFormat,
    files_below,
    rows_of,
    suffix_of,
)
from moe_emergence.data.streams import Row, stream_rows, text_of
from moe_emergence.data.texts import DomainTexts, take_texts
from moe_emergence.hub_access import reason
from moe_emergence.settings import check

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True)
class DomainFiles:
    """The file or sub-folder of a domain, the files in it and their common format."""

    path: Path
    files: tuple[Path, ...]
    form: FileFormat


def find_domain(folder: Path, domain: str) -> DomainFiles:
    """The files of one domain in a data folder; `ValueError` if there is not exactly one place."""
    candidates = sorted(
        entry
        for entry in folder.iterdir()
        if (entry.name == domain and entry.is_dir())
        or (entry.is_file() and entry.name.removeprefix(domain).lower() in SUFFIXES)
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
    files, unread = ([path], []) if path.is_file() else files_below(path)
    if unread:
        kinds = ", ".join(sorted({other.suffix or other.name for other in unread}))
        logger.warning("%s: %d files are not read (%s)", path, len(unread), kinds)
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


def shuffled(texts: Iterable[str], draw: random.Random) -> Iterator[str]:
    """The same texts; each leaves a buffer of `SHUFFLE_BUFFER` at a random time."""
    buffer: list[str] = []
    for text in texts:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(text)
            continue
        place = draw.randrange(SHUFFLE_BUFFER)
        yield buffer[place]
        buffer[place] = text
    draw.shuffle(buffer)
    yield from buffer


def read_domain(
    found: DomainFiles, domain: str, *, limit_bytes: int, seed: int, text_field: str, cache_dir: str
) -> DomainTexts:
    """Texts of one domain; `ValueError` names the domain, the file and what to change.

    `cache_dir` is what every source is given; nothing of local files is kept there.
    """
    field = "text" if found.form == "text" else text_field
    change = "name the field with the text with --text-field"
    draw = random.Random(seed)
    files = draw.sample(found.files, len(found.files))

    def texts() -> Iterator[str]:
        for path in files:
            where = f"--data {path}: domain {domain}"

            def explain(error: Exception, where: str = where) -> str:
                if isinstance(error, ImportError):
                    return f"{where}: {reason(error)}; install it or give the file uncompressed"
                return f"{where} could not be read ({reason(error)}); replace the damaged file"

            def rows(path: Path = path) -> Iterable[Row]:
                return rows_of(path, field)

            for row in stream_rows(rows, explain):
                text = text_of(row, field, where, change)
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise ValueError(explain(error)) from error
                yield text

    taken = take_texts(domain, shuffled(texts(), draw), limit_bytes)
    if not taken and not any(True for _ in texts()):
        raise ValueError(f"--data {found.path}: domain {domain}: the file is empty; put text in it")
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

"""Texts of the domains in local files.

Files may be sorted, by package or by author, so documents pass through a seeded shuffle buffer
before the first `size_mb` of them are taken.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moe_emergence.data.files import longest_row, rows_of
from moe_emergence.data.places import DomainFiles, find_domains
from moe_emergence.data.streams import Row, stream_rows, text_of, unreadable
from moe_emergence.data.texts import DomainTexts, take_texts
from moe_emergence.hub_access import reason
from moe_emergence.settings import check

SHUFFLE_BUFFER = 10_000
SHUFFLE_TIMES = 32
"""The buffer holds this many times the text that is wanted, at most."""


def shuffled(texts: Iterable[str], draw: random.Random, most: int) -> Iterator[str]:
    """The same texts; each leaves a buffer of `SHUFFLE_BUFFER`, or of `most` characters, at a
    random time."""
    buffer: list[str] = []
    size = 0
    for text in texts:
        size += len(text)
        if len(buffer) < SHUFFLE_BUFFER and (size <= most or not buffer):
            buffer.append(text)
            continue
        place = draw.randrange(len(buffer))
        text, buffer[place] = buffer[place], text
        size -= len(text)
        yield text
        while size > most and len(buffer) > 1:
            text = buffer.pop(draw.randrange(len(buffer)))
            size -= len(text)
            yield text
    draw.shuffle(buffer)
    yield from buffer


def read_domain(
    found: DomainFiles, domain: str, *, limit_bytes: int, seed: int, text_field: str
) -> DomainTexts:
    """Texts of one domain; `ValueError` names the domain, the file and what to change."""
    field = "text" if found.form == "text" else text_field
    change = "name the field with the text with --text-field"
    draw = random.Random(seed)
    longest = longest_row(limit_bytes)
    files = draw.sample(found.files, len(found.files))
    others = () if found.only is None else found.only[:1]

    def texts() -> Iterator[str]:
        for path in files:
            where = f"--data {path}: domain {domain}"

            def explain(error: Exception, where: str = where) -> str:
                if isinstance(error, ImportError):
                    return f"{where}: {reason(error)}; install it or give the file uncompressed"
                return unreadable(where, error)

            def rows(path: Path = path) -> Iterable[Row]:
                return rows_of(path, found.form, field, *others, longest=longest)

            for row in stream_rows(rows, explain):
                if field in row and not found.has(row):
                    continue
                text = text_of(row, field, where, change)
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise ValueError(explain(error)) from error
                yield text

    taken = take_texts(domain, shuffled(texts(), draw, SHUFFLE_TIMES * limit_bytes), limit_bytes)
    if not taken and not any(True for _ in texts()):
        check(
            found.only is None,
            "--domains",
            domain,
            f"no row of {found.path} has {' = '.join(found.only or ())}; choose another",
        )
        raise ValueError(
            f"--data {found.path}: domain {domain}: the file is empty, or its lines are too long "
            "for --size-mb; put text in it"
        )
    source = {"source": "folder", "path": str(found.path)}
    if found.only is not None:
        source["rows"] = " = ".join(found.only)
    sizes = [part.stat().st_size for file in found.files for part in _parts(file)]
    return DomainTexts(taken, source | {"files": len(sizes), "bytes": sum(sizes)})


def _parts(file: Path) -> Iterable[Path]:
    return [file] if file.is_file() else file.glob("*.arrow")


def read_folder(
    path: str,
    *,
    limit_bytes: int,
    seed: int,
    text_field: str = "text",
    domains: Sequence[str] = (),
    domain_field: str | None = None,
) -> dict[str, DomainTexts]:
    """Texts of `domains`, or of every domain at `path`, up to `limit_bytes` bytes of UTF-8 each.

    Raises `ValueError` naming the file, the domain and the flag for anything that is missing,
    double, empty, damaged or lacks a field.
    """
    found = find_domains(Path(path), domains, domain_field, longest=longest_row(limit_bytes))
    return {
        domain: read_domain(
            files, domain, limit_bytes=limit_bytes, seed=seed, text_field=text_field
        )
        for domain, files in found.items()
    }

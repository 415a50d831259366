"""What lies under `--data`: which domains, and the files of each.

A folder has one file or sub-folder per domain, named for it. A single file, or a data set that
`datasets` saved, is one domain, or holds several mixed, told apart by a field of every row.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from moe_emergence.config.data import check_domain_names
from moe_emergence.data.files import (
    READABLE,
    SUFFIXES,
    FileFormat,
    files_below,
    is_saved,
    is_saved_splits,
    longest_row,
    rows_of,
    suffix_of,
)
from moe_emergence.data.streams import Row, stream_rows, unreadable
from moe_emergence.progress import progress_bar
from moe_emergence.settings import check

logger = logging.getLogger(__name__)

SPLITS = frozenset({"train", "training", "validation", "valid", "val", "dev", "test", "eval"})
MOST_DOMAINS = 64
"""More values of a field than this are no domains."""
ABOUT = ("readme", "license", "licence", "notice", "copying")
"""Beginnings of the names of files that are about a data set, not in it."""
OTHER_FOLDERS = frozenset({"tokenizer.json", "tokenizer_config.json", "config.json"})
"""Files of tokenizers, models and runs."""


@dataclass(frozen=True)
class DomainFiles:
    """The place of a domain, the files in it, their common format, and which rows are meant."""

    path: Path
    files: tuple[Path, ...]
    form: FileFormat
    only: tuple[str, str] | None = None
    """Field and its value in the domain's rows; none: all rows."""

    def has(self, row: Row) -> bool:
        """Whether a row is the domain's."""
        return self.only is None or _name(row.get(self.only[0])) == self.only[1]


def find_domains(
    path: Path,
    names: Sequence[str] = (),
    domain_field: str | None = None,
    *,
    longest: int = longest_row(0),
) -> dict[str, DomainFiles]:
    """The domains at `path`: `names` in their order, or all that are there, by name.

    `longest` is for `domain_field`, see `rows_of`.

    Raises:
        ValueError: naming the flag, for a domain that is not there or not in exactly one place, and
            for files that cannot be told apart or read.
    """
    check(
        path.is_file() or path.is_dir(),
        "--data",
        path,
        'no such file or folder; give "embedded", "hub", or a folder with a file or sub-folder per '
        "domain",
    )
    if domain_field is not None:
        whole = _place(path, path.name)
        found = tuple(names) or _values(whole, domain_field, longest)
        return {name: replace(whole, only=(domain_field, name)) for name in found}
    if path.is_file() or is_saved(path) or "train" in _saved_splits(path):
        name = _stem(path)
        check(
            tuple(names) in ((), (name,)),
            "--domains",
            " ".join(names),
            f"--data {path} is one domain, {name}; name the field that tells its domains with "
            "--domain-field, or leave --domains out",
        )
        check_domain_names((name,), "--data")
        return {name: _place(path, name)}
    return {name: find_domain(path, name) for name in tuple(names) or _domains_in(path)}


def find_domain(folder: Path, domain: str) -> DomainFiles:
    """The files of one domain in a data folder; `ValueError` if there is not exactly one place."""
    candidates = sorted(entry for entry in folder.iterdir() if _stem(entry) == domain)
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
            f"with a suffix from {READABLE}, or choose others with --domains",
        )
    return _place(candidates[0], domain)


def _domains_in(folder: Path) -> tuple[str, ...]:
    """Names of the entries with text; warns of others that may have been meant."""
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    names = tuple(sorted({_stem(entry) for entry in entries if _has_text(entry)}))
    passed = [e.name for e in entries if not _has_text(e) and not e.name.lower().startswith(ABOUT)]
    if passed:
        logger.warning(
            "--data %s: not read as domains: %s (readable are %s; --domains chooses)",
            folder, ", ".join(passed), READABLE,
        )  # fmt: skip
    check(
        bool(names),
        "--data",
        folder,
        f"no domain in it; give a folder with a file ({READABLE}) or a sub-folder per domain",
    )
    check(
        not SPLITS.issuperset(names) or len(names) == 1,
        "--data",
        folder,
        f"{', '.join(names)} are splits, not domains; name the files for their domains, or the "
        "field that tells them with --domain-field",
    )
    check(
        len(names) <= MOST_DOMAINS,
        "--data",
        folder,
        f"{len(names)} files and folders, each a domain; choose with --domains, or put the files "
        "of each domain in a folder",
    )
    check_domain_names(names, "--data")
    return names


def _has_text(entry: Path) -> bool:
    """Whether an entry of a data folder is text: no licence, manifest, tokenizer, model or run."""
    if entry.is_file():
        name = entry.name.lower()
        return bool(_stem(entry)) and not (name.startswith(ABOUT) or name.endswith("manifest.json"))
    if is_saved(entry) or is_saved_splits(entry):
        return True
    files = files_below(entry)[0]
    return bool(files) and not any(file.name in OTHER_FOLDERS for file in files)


def _stem(path: Path) -> str:
    """What a folder or readable file names; empty for other files."""
    if path.is_dir():
        return path.resolve().name
    suffix = suffix_of(path.name)
    return path.name[: -len(suffix)] if suffix else ""


def _place(path: Path, domain: str) -> DomainFiles:
    if is_saved(path):
        return DomainFiles(path, (path,), "saved")
    if splits := _saved_splits(path):
        used = ("train",) if "train" in splits else splits
        if left := [split for split in splits if split not in used]:
            logger.info("%s: not read: %s", path, ", ".join(left))
        return DomainFiles(path, tuple(path / split for split in used), "saved")
    files, unread = ([path], []) if path.is_file() else files_below(path)
    if unread:
        kinds = ", ".join(sorted({other.suffix or other.name for other in unread}))
        logger.warning("%s: %d files are not read (%s)", path, len(unread), kinds)
    check(
        bool(files) and all(suffix_of(file.name) for file in files),
        "--data",
        path,
        f"no file with text for {domain}; add {READABLE}",
    )
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


def _saved_splits(path: Path) -> tuple[str, ...]:
    if not is_saved_splits(path):
        return ()
    return tuple(sorted(entry.name for entry in path.iterdir() if is_saved(entry)))


def _values(whole: DomainFiles, field: str, longest: int) -> tuple[str, ...]:
    """The values that `field` has in any row."""
    found: set[str] = set()
    without = 0
    with progress_bar(f"domains in {whole.path.name}", len(whole.files)) as advance:
        for file in whole.files:

            def rows(file: Path = file) -> Iterable[Row]:
                return rows_of(file, whole.form, field, longest=longest)

            for row in stream_rows(rows, partial(unreadable, f"--data {file}:")):
                check(
                    field in row,
                    "--domain-field",
                    field,
                    f"{file} has {', '.join(sorted(row))}; name one of these",
                )
                name = _name(row[field])
                without += not name
                if name:
                    found.add(name)
                check(
                    len(found) <= MOST_DOMAINS,
                    "--domain-field",
                    field,
                    f"it has more than {MOST_DOMAINS} values; choose some with --domains, or name "
                    "another field",
                )
            advance(1)
    if without:
        logger.warning("%s: %d rows without %s are left out", whole.path, without, field)
    check(bool(found), "--domain-field", field, f"no row of {whole.path} has a value in it")
    names = tuple(sorted(found))
    check_domain_names(names, "--domain-field")
    return names


def _name(value: object) -> str:
    """A domain's name from a field; empty for none."""
    return "" if value is None else str(value).strip()

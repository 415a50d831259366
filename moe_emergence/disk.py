"""Files and folders that are there whole or not at all, also after the power has gone.

What is written lies beside its place, as `.NAME.RANDOM.tmp`, until all of it is on the disk; then
it is renamed, and the name is on the disk too. Every file that this package writes is written here.
"""

import contextlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_emergence.errors import RunError
from moe_emergence.interrupt import finishing

_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]+\.(old|tmp)")
_ADVICE = {
    "write": "free some space or give another folder (--output-dir, --out or --cache-dir). "
    "What was saved before is untouched",
    "remove": "let it be written, or delete it by hand",
    "read": "the disk may be damaged: put the file back from a copy, or give another",
}
DAY = 24 * 60 * 60.0
"""Seconds after which nobody is still writing."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place to write to, which becomes `path` at the end of the block; `path` outlasts a failure.

    Raises:
        RunError: when the disk is full or not writable, naming the path.
    """
    new = _beside(path, "tmp")
    with named(path):
        try:
            make_folder(path.parent)
            yield new
            with finishing():
                _sync(new)
                new.replace(path)
                _sync(path.parent)
        except BaseException:
            with finishing(), contextlib.suppress(OSError):
                new.unlink()
            raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, see `whole_file`."""
    with whole_file(path) as new:
        new.write_bytes(text.encode())


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `path` at the end of the block.

    A folder that is there is replaced; after a failure it is as it was.

    Raises:
        RunError: when the disk is full or not writable, naming the path.
    """
    old = _beside(path, "old")
    with named(path), _new_folder(path) as new:
        yield new
        _sync_all(new)
        with finishing():
            if path.exists():
                path.rename(old)
            try:
                new.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
            _sync(path.parent)
            if old.exists():
                shutil.rmtree(old)


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """The folder `path`, after `make` has filled it if it was not there.

    Processes may race: the folder appears whole, and the first one to make it wins. What `make`
    raises leaves nothing behind.

    Raises:
        RunError: when the disk is full or not writable, naming the path.
    """
    if path.is_dir():
        return path
    clear_unfinished(path.parent, idle_seconds=DAY)
    with named(path), _new_folder(path) as new:
        make(new)
        _sync_all(new)
        try:
            new.rename(path)
        except OSError:
            if not path.is_dir():
                raise
            shutil.rmtree(new)
        _sync(path.parent)
    return path


def make_folder(path: Path) -> None:
    """Make the folder and those above it that are missing; they stay.

    Raises:
        RunError: when the disk is full or not writable, naming the path.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    with named(path):
        path.mkdir(exist_ok=True)
        _sync(path.parent)


@finishing()
def remove_folder(path: Path) -> None:
    """Delete a folder with all in it: whole or, after a failure, under a name that is cleared away.

    Raises:
        RunError: when it cannot be deleted, naming the path.
    """
    hidden = _beside(path, "tmp")
    with named(path, "remove"):
        path.rename(hidden)
        shutil.rmtree(hidden)


def remove_file(path: Path) -> None:
    """Delete a file, if it is there.

    Raises:
        RunError: when it cannot be deleted, naming the path.
    """
    with named(path, "remove"):
        path.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """All of a text file; `OSError` itself does not say which file could not be read.

    Raises:
        RunError: naming the path.
    """
    with named(path, "read"):
        return path.read_text(encoding="utf-8")


@finishing()
def append(path: Path, content: bytes) -> None:
    """Write to the end of a file, all of it or, where the disk allows to go back, none.

    Raises:
        RunError: when the disk is full or not writable, naming the path.
    """
    make_folder(path.parent)
    with named(path):
        is_new = not path.exists()
        end = 0 if is_new else path.stat().st_size
        try:
            with path.open("ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, end)
            raise
        if is_new:
            _sync(path.parent)


def clear_unfinished(folder: Path, idle_seconds: float = 0.0, only: str | None = None) -> None:
    """Clear away what killed processes, or a disk that refused, left in a folder.

    What was being replaced is put back where the new one did not make it; the rest is deleted. In a
    folder that others write to, `idle_seconds` says how old it has to be, or `only` what it was to
    become.

    Raises:
        RunError: when it cannot be deleted, naming the path.
    """
    for path in [*folder.glob(".*")]:
        name = _UNFINISHED.fullmatch(path.name)
        if name is None or only not in (None, name[1]):
            continue
        # another process may finish what it writes, or clear it away too
        with named(path, "remove"), contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime < idle_seconds:
                continue
            target = path.with_name(name[1])
            if name[2] == "old" and not target.exists():
                path.rename(target)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                remove_file(path)


@contextmanager
def named(path: Path, action: str = "write") -> Iterator[None]:
    """Failures of the disk in the block, whichever library meets them, become one line.

    Raises:
        RunError: naming the path and what to do.
    """
    try:
        yield
    except Exception as error:
        if not _is_disk_failure(error):
            raise
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise RunError(f"cannot {action} {path}: {why}; {_ADVICE[action]}") from error


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    new = _beside(path, "tmp")
    make_folder(path.parent)
    try:
        new.mkdir()
        yield new
    except BaseException:
        with finishing():
            shutil.rmtree(new, ignore_errors=True)
        raise


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.{kind}")


def _sync_all(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    """Returns when the file, or the names in the folder, would outlast a power cut."""
    if path.is_dir():
        if os.name == "nt":
            return  # folders cannot be opened there
        handle = os.open(path, os.O_RDONLY)
    else:
        handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_disk_failure(error: Exception) -> bool:
    # safetensors, tokenizers and torch.save report a full disk as errors of their own
    of_libraries = ("No space left", "PytorchStreamWriter", "inline_container", "os error")
    return isinstance(error, OSError) or (
        not isinstance(error, RunError) and any(text in str(error) for text in of_libraries)
    )

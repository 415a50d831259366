"""Folders that take long to make and are kept: whole, or not there."""

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from moe_emergence.interrupt import finishing


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, after `make` has filled it if it was not there.

    Processes may race: the folder appears whole, and the first one to make it wins. What `make`
    raises leaves nothing behind.
    """
    if folder.is_dir():
        return folder
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        unfinished.mkdir(parents=True)
        make(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        with finishing():
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder

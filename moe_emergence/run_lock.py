"""One process at a time writes to a folder: a lock that ends with its process."""

import contextlib
import errno
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_emergence.disk import named
from moe_emergence.run_folder import LOCK

logger = logging.getLogger(__name__)

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What file systems say, some of those of a network, that cannot lock."""


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Keep the folder, which is made if need be, to this process within the block.

    The lock is the kernel's (flock) on a file `.lock`, which says whose it is and goes with the
    block. One that a killed process left is not locked, and is taken over. Where nothing can be
    locked (Windows, some network file systems) a warning is all.

    Raises:
        ValueError: when another process has it, naming `flag`, its host and its number.
        RunError: when the folder cannot be written.
    """
    is_new = not folder.exists()
    with named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _take(folder, flag)
    try:
        yield
    finally:
        if descriptor is not None:
            # while it is still held: whoever waits for this very file takes a new one
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()
            os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _take(folder: Path, flag: str) -> int | None:
    """The locked file, or None where there are no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the one before may have unlinked it in the meantime
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.truncate(descriptor, 0)
                owner = f"process {os.getpid()} on {socket.gethostname()}\n"
                os.pwrite(descriptor, owner.encode(), 0)
                return descriptor
        except FileNotFoundError:
            pass
        except OSError as error:
            owner = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if isinstance(error, BlockingIOError) or error.errno == errno.EACCES:
                raise ValueError(
                    f"{flag}: {folder} is in use by {owner or 'another process'}; wait for it, "
                    f"stop it, or give another folder"
                ) from error
            if error.errno in _UNSUPPORTED:
                logger.warning(
                    "%s: cannot be locked here; take care that no other process writes there",
                    folder,
                )
                path.unlink(missing_ok=True)
                return None
            raise
        os.close(descriptor)

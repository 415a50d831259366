"""Compressed files as streams that are never longer in memory than a few blocks.

An archive of a few megabytes can hold terabytes, so the compressed bytes are taken in small parts,
and one that grows beyond all text is refused.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

PART = 1024
"""Compressed bytes that are unpacked at once. Of .zst they become 32 MB at most, of .gz 1 MB."""
AT_ONCE = 2**20
"""Bytes that .bz2 and .xz, of which so few may become gigabytes, are asked for."""
MOST_MEMORY = 2**28
"""Bytes that an .xz file may ask for; its strongest preset asks for 65 MB."""
MOST_TIMES = 200
"""How many times its size a file may unpack to. Text comes to 3 to 10 times, logs to 50."""
SMALL = 2**26
"""Bytes that a file may unpack to whatever its size."""

COMPRESSED = ("", ".gz", ".xz", ".bz2", ".zst")


def opened(path: Path) -> io.BufferedReader:
    """The file's bytes, unpacked as its suffix says.

    Reading raises `EOFError` for a file that ends too early, and `ValueError` for one that is
    damaged or unpacks to more than `MOST_TIMES` its size.
    """
    new = _unpacker(path.suffix.lower())
    return path.open("rb") if new is None else io.BufferedReader(_Unpacked(path, new))


def _unpacker(suffix: str) -> Callable[[], Any] | None:
    """What makes an object with `decompress`, `eof` and `unused_data` for a part of a file."""
    if suffix == ".gz":
        return lambda: zlib.decompressobj(zlib.MAX_WBITS | 16)
    if suffix == ".bz2":
        return bz2.BZ2Decompressor
    if suffix == ".xz":
        return lambda: lzma.LZMADecompressor(memlimit=MOST_MEMORY)
    if suffix == ".zst":
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj
    return None


class _Unpacked(io.RawIOBase):
    """All members of a file, one after another."""

    def __init__(self, path: Path, new: Callable[[], Any]) -> None:
        self._new, self._file = new, path.open("rb")
        self._left_to_make = SMALL + MOST_TIMES * path.stat().st_size
        self._object: Any = None
        self._left = self._ready = b""
        self._has_begun = False

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as there is something at once; 0 at the end."""
        while not self._ready:
            has_more = not getattr(self._object, "needs_input", True)
            data = b"" if has_more else self._left or self._file.read(PART)
            self._left = self._left if has_more else b""
            if not data and not has_more:
                if self._object is not None:
                    raise EOFError("Compressed file ended before the end of its last frame")
                return 0
            if self._object is None:
                if self._has_begun and not (data := data.lstrip(b"\0")):
                    continue  # padding
                self._object, self._has_begun = self._new(), True
            limited = hasattr(self._object, "needs_input")
            try:
                self._ready = self._object.decompress(data, *([AT_ONCE] if limited else []))
            except Exception as error:  # every library has its own
                raise ValueError(f"it cannot be unpacked, {error}") from error
            self._left_to_make -= len(self._ready)
            if self._left_to_make < 0:
                raise ValueError(f"it unpacks to more than {MOST_TIMES} times its size")
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

"""Rows of a JSON file as a stream: objects line by line, or in one list.

No more of a file is in memory than its longest row.
"""

import codecs
import io
import json
import logging
import math
import re
from collections.abc import Iterator
from typing import Any

from moe_emergence.data.streams import Row

logger = logging.getLogger(__name__)

CHUNK = 2**16
"""Bytes that are read at once, and twice as many while they do not hold an object."""

_SPACE = re.compile(r"\s*")


def json_rows(stream: io.BufferedReader, longest: int, name: str) -> Iterator[Row]:
    """The objects in `stream`, which is read as UTF-8.

    Lines of more than `longest` bytes are passed over, with a warning that names the file.

    Raises:
        ValueError: for anything else than objects, with the line or the place in the list.
    """
    number = too_long = 0
    has_begun = False
    while line := stream.readline(longest + 1):
        number += 1
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.isspace():
            number += _skip_blank(stream)
        elif not has_begun and line.lstrip().startswith(b"["):
            yield from _listed(line.lstrip()[1:], stream, longest)
            return
        elif len(line) > longest:
            too_long += 1
            while line and not line.endswith(b"\n"):
                line = stream.readline(CHUNK)
        else:
            has_begun = True
            text, place = _decoded(line, number), 0
            while (place := _after_space(text, place)) < len(text):
                row, place = _parsed(text, place, f"line {number}")
                yield row
    if too_long:
        size = f"{longest / 1e6:,.0f} MB"
        logger.warning("%s: %d lines longer than %s passed over", name, too_long, size)


def _skip_blank(stream: io.BufferedReader) -> int:
    """Go on to what is no white space; the lines that end before it."""
    lines = 0
    while (head := stream.peek(1)) and head[:1].isspace():
        blank = stream.read(len(head) - len(head.lstrip()))
        lines += blank.count(b"\n")
    return lines


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    assert found is not None
    return found.end()


def _decoded(line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"line {number}: not UTF-8, {error.reason}") from error


def _listed(data: bytes, stream: io.BufferedReader, longest: int) -> Iterator[Row]:
    """Objects of the list whose bytes after the bracket are `data` and what `stream` has."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    text, place, number, wanted, is_end = decode(data), 0, 0, CHUNK, False
    wants = "an object or the end"
    while True:
        place = _after_space(text, place)
        mark = text[place : place + 1]
        if mark == "]" and wants in ("an object or the end", "a comma or the end"):
            wants, place = "nothing", place + 1
        elif mark == "," and wants == "a comma or the end":
            wants, place = "an object", place + 1
        elif mark and not wants.startswith("an object"):
            raise ValueError(f"after object {number} of the list there has to be {wants}")
        elif row := mark and _whole(text, place, number + 1, is_end or len(text) - place > longest):
            yield row[0]
            place, number, wanted, wants = row[1], number + 1, CHUNK, "a comma or the end"
        elif is_end:
            if wants != "nothing":
                raise ValueError("the list does not end")
            return
        else:
            data = stream.read(wanted)
            is_end, wanted = not data, min(2 * wanted, longest)
            text, place = text[place:] + decode(data, is_end), 0


def _whole(text: str, place: int, number: int, is_last: bool) -> tuple[Row, int] | None:
    """The object at `place` and where it ends; None while there may be more of it to come."""
    try:
        return _parsed(text, place, f"object {number} of the list")
    except ValueError:
        if is_last:
            raise
        return None


def _parsed(text: str, place: int, where: str) -> tuple[Row, int]:
    """The object at `place` in `text`, and where it ends."""
    try:
        row, end = _DECODER.raw_decode(text, place)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON, {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row is {type(row).__name__}, not an object with fields")
    return row, end


def _whole_number(digits: str) -> Any:
    """Numbers beyond what Python reads are of no use here; the row may still have a text."""
    return int(digits) if len(digits) < 4000 else math.inf


_DECODER = json.JSONDecoder(parse_int=_whole_number)

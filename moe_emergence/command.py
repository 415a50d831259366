"""What every `python -m moe_emergence.…` shares: reading flags, and a sign that it is loading."""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import dropwhile, takewhile
from typing import Any, TypeVar

import tyro

from moe_emergence.flags import spelled_out
from moe_emergence.printable import shortened
from moe_emergence.progress import progress_bar
from moe_emergence.settings import LONGEST_SHOWN, SettingError, check_plain
from moe_emergence.words import READERS

T = TypeVar("T")

MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)
"""Flags of nested groups have no prefixes, and switches take yes or no."""


def parse(cls: type[T], argv: Sequence[str], prog: str, default: T | None = None) -> T:
    """Fill the dataclass `cls` from flags, written as `words` says.

    Raises:
        ValueError: for flags that cannot be used, in one line.
    """
    hidden = io.StringIO()
    start: dict[str, Any] = {} if default is None else {"default": default}
    try:
        args = spelled_out(cls, argv)
        with contextlib.redirect_stderr(hidden):
            found: T = tyro.cli(
                cls, args=args, prog=prog, config=MARKERS, registry=READERS, **start
            )
        check_plain(found)
    except SystemExit as stop:
        if stop.code:
            message = _refused(stop) or _first_message(hidden.getvalue())
            raise ValueError(f"{shortened(message, LONGEST_SHOWN)} (see {prog} --help)") from None
        raise
    except ValueError as error:
        raise ValueError(f"{error} (see {prog} --help)") from None
    return found


def _refused(stop: BaseException) -> str | None:
    """What the configuration itself said, whole: tyro breaks long words in its box."""
    while stop.__context__ is not None:
        stop = stop.__context__
        if isinstance(stop, SettingError):
            return str(stop)
    return None


def _first_message(box: str) -> str:
    """The message inside the box tyro draws around an error, of lines or in ASCII, as one line."""

    def is_rule(line: str) -> bool:
        return set(line) <= set("─╰╯-")

    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    message = list(takewhile(lambda line: not is_rule(line), dropwhile(is_rule, lines)))
    if message and message[0].startswith("Missing from"):
        flags = re.findall(r"(?m)^(--[\w-]+)", "\n".join(message))
        return f"{', '.join(flags)}: required and not given"
    text = re.sub(r"^Error parsing \w*:? ?", "", " ".join(message))
    if text.startswith("Unrecognized options:"):
        return f"{text.partition(':')[2].strip()!r}: more words than the flags take; leave them out"
    return re.sub(r"^(--\S+):", r"\1", text)


@contextmanager
def loading() -> Iterator[None]:
    """Show on a terminal, within the block, that torch and transformers are being imported."""
    with progress_bar("loading torch and transformers", None):
        yield

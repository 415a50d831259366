"""What every `python -m moe_emergence.…` shares: parsing, the version and errors in one line."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from moe_emergence import __version__
from moe_emergence.errors import exit_code

T = TypeVar("T")


def parse(cls: type[T], argv: Sequence[str], prog: str, default: T | None = None) -> T:
    """Fill the dataclass `cls` from flags (nested fields without prefixes).

    Raises:
        ValueError: for flags that cannot be used, in one line.
    """
    hidden = io.StringIO()
    flat: Any = tyro.conf.OmitArgPrefixes[cls]  # type: ignore[valid-type,misc]
    start: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(hidden):
            result: T = tyro.cli(flat, args=list(argv), prog=prog, **start)
    except SystemExit as stop:
        if stop.code:
            raise ValueError(_first_message(hidden.getvalue(), prog)) from None
        raise
    return result


def _first_message(box: str, prog: str) -> str:
    """The message inside the box tyro draws around an error, as one line."""
    lines = [line.strip("│ ").strip() for line in box.splitlines()[1:]]
    message = []
    for line in lines:
        if line.startswith(("─", "╰", "╭")):
            break
        message.append(line)
    if message and message[0].startswith("Missing from"):
        flags = re.findall(r"(?m)^(--[\w-]+)", "\n".join(message))
        return f"{', '.join(flags)}: required and not given (see {prog} --help)"
    text = re.sub(r"^Error parsing (?!--)\w*:? ?", "", " ".join(message))
    return f"{text} (see {prog} --help)"


def run(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """The exit code of `main(argv)`, see `errors.exit_code`; with --version that is all it says."""
    if "--version" in argv:
        sys.stdout.write(f"moe-emergence {__version__}\n")
        return 0
    return exit_code(main, argv)

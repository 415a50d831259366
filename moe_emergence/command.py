"""What every `python -m moe_emergence.…` shares: parsing, logging and errors in one line."""

import contextlib
import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import transformers
import tyro
from rich.console import Console
from rich.logging import RichHandler

from moe_emergence.dependencies import untested_here
from moe_emergence.errors import exit_code

T = TypeVar("T")

logger = logging.getLogger(__name__)


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
    """Set up logging, call `main(argv)` and return the exit code, see `errors.exit_code`."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )
    # by `python -m` the entry point's own logger has the second name
    for ours in ("moe_emergence", "__main__"):
        logging.getLogger(ours).setLevel(logging.INFO)
    # a run has its own progress bar; those of every saved and loaded file would bury it
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)
    if os.environ.get("RANK", "0") == "0":
        for dependency in untested_here():
            logger.warning("%s", dependency)
    return exit_code(main, argv)

"""How every `python -m moe_emergence.…` begins and ends."""

import sys
from collections.abc import Callable
from typing import NoReturn

from moe_emergence import __version__
from moe_emergence.errors import exit_code
from moe_emergence.interrupt import EndAtOnce


def run(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """The exit code of `main(argv)`, see `errors.exit_code`; with --version that is all it says."""
    if "--version" in argv:
        sys.stdout.write(f"moe-emergence {__version__}\n")
        return 0
    return exit_code(main, argv)


def enter(main: Callable[[list[str]], int]) -> NoReturn:
    """Run `main` with the command line and exit with its code.

    What `main` imports is not imported yet, so that a signal finds its handler.
    """
    with EndAtOnce():
        code = run(main, sys.argv[1:])
    sys.exit(code)

"""How a command fails: the one exception of our own, and exit codes."""

import contextlib
import sys
from collections.abc import Callable

from moe_emergence.interrupt import SIGNALS, Interrupted, interrupted_code
from moe_emergence.printable import printable, shortened

LONGEST_LINE = 1400
"""Characters of an error; what was given may have been a book."""


class RunError(RuntimeError):
    """A run cannot go on (NaN loss, torn checkpoint, disk full): the message says what to do.

    Bad settings raise `ValueError` instead. The command line turns a `ValueError` into exit code 2
    and a `RunError` into exit code 1, each with one line on stderr.
    """


def exit_code(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """Call `main(argv)` and turn its errors into one line on stderr and an exit code.

    2 for bad settings (`ValueError`) and where a package of an extra is not installed, 1 for
    failures while running (`RunError`, `OSError`) and for whatever is raised in the code of a
    dependency, 128 and its number for a signal, also where a dependency made another error of it.
    With `--debug` the traceback is shown instead, as always for an error of our own.
    """
    try:
        return main(argv)
    except (KeyboardInterrupt, Exception) as error:
        stop = _interruption(error)
        if stop is not None:
            number = stop.number if isinstance(stop, Interrupted) else SIGNALS[0]
            return _fail(str(stop) or "interrupted", interrupted_code(number))
        if _debugs(argv):
            raise
        if isinstance(error, ValueError):
            return _fail(str(error), 2)
        if isinstance(error, RunError | OSError):
            return _fail(str(error), 1)
        # what is installed is read for this alone, not at every start
        from moe_emergence.dependencies import raised_in
        from moe_emergence.extras import advice

        if missing := advice(error):
            return _fail(missing, 2)
        package = raised_in(error)
        if package is None:
            raise
        kind = type(error).__name__
        return _fail(f"{kind} in {package}: {error} (--debug shows where)", 1)


def _interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interruption that an error is, or that it was raised for."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def _debugs(argv: list[str]) -> bool:
    """Whether the last --debug of a command line that may be wrong says yes."""
    found = False
    for place, word in enumerate(argv):
        if word in ("--debug", "--debug=yes"):
            found = argv[place + 1 : place + 2] != ["no"]
        elif word in ("--no-debug", "--debug=no"):
            found = False
    return found


def _fail(message: str, code: int) -> int:
    line = shortened(printable(" ".join(message.split())), LONGEST_LINE)
    # the terminal may be gone
    with contextlib.suppress(OSError):
        sys.stderr.write(f"error: {line}\n")
    return code

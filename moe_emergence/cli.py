"""The console script `moe-emergence`: the same verbs as `python -m moe_emergence.…`."""

import importlib
import sys
from typing import NoReturn

from moe_emergence.entry import enter
from moe_emergence.settings import check_known

PROG = "moe-emergence"

VERBS = {
    "train": "upcycle, train, evaluate and resume",
    "verify": "certify that a path computes what the sequential one defines",
    "suite": "plan, run and report an experiment of many runs",
    "analyze": "see how a mixture routes, in tables, figures and one page",
    "generate": "continue a prompt, and see which expert reads which token",
}
COMPLETION = "completion"


def dispatch_verb(argv: list[str]) -> int:
    """Call the entry point that `argv[0]` names with the rest of the arguments."""
    if not argv or argv[0] in ("-h", "--help"):
        verbs = VERBS | {COMPLETION: "print what bash, zsh or fish reads to complete all this"}
        lines = "".join(f"  {verb:<12}{purpose}\n" for verb, purpose in verbs.items())
        sys.stdout.write(f"usage: {PROG} [--version] VERB [OPTIONS]\n{lines}")
        return 0
    if argv[0] == COMPLETION:
        from moe_emergence.completion import print_completion

        print_completion(" ".join(argv[1:]), PROG)
        return 0
    check_known(PROG, argv[0], [*VERBS, COMPLETION])
    main = importlib.import_module(f"moe_emergence.{argv[0]}").main
    code: int = main(argv[1:])
    return code


def main() -> NoReturn:
    """Entry point of the console script."""
    enter(dispatch_verb)

"""The console script `moe-emergence`: the same verbs as `python -m moe_emergence.…`."""

import importlib
import sys

from moe_emergence.command import run

VERBS = {
    "train": "upcycle, train, evaluate and resume",
    "verify": "certify that a path computes what the sequential one defines",
    "suite": "plan, run and report an experiment of many runs",
    "analyze": "see how a mixture routes, in tables, figures and one page",
    "generate": "continue a prompt, and see which expert reads which token",
}


def dispatch_verb(argv: list[str]) -> int:
    """Call the entry point that `argv[0]` names with the rest of the arguments."""
    usage = "usage: moe-emergence VERB [OPTIONS]\n" + "".join(
        f"  {verb:<10}{purpose}\n" for verb, purpose in VERBS.items()
    )
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(usage)
        return 0
    if argv[0] not in VERBS:
        raise ValueError(f"moe-emergence {argv[0]}: choose from {', '.join(VERBS)}")
    main = importlib.import_module(f"moe_emergence.{argv[0]}").main
    code: int = main(argv[1:])
    return code


def main() -> int:
    """Entry point of the console script."""
    return run(dispatch_verb, sys.argv[1:])

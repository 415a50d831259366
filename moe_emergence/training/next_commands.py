"""What to type after a run: how to go on with it, or how to look at it."""

import os
import shlex
from collections.abc import Sequence

from moe_emergence.run_folder import RunFolder

_NOT_AGAIN = ("--resume", "--stop-after")


def resume_command(argv: Sequence[str]) -> str:
    """The command with the flags `argv` again, from the newest checkpoint on and to the end."""
    flags = [*argv]
    for name in _NOT_AGAIN:
        while name in flags:
            place = flags.index(name)
            del flags[place : place + 2]
        flags = [flag for flag in flags if not flag.startswith(f"{name}=")]
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    start = "(your launcher)" if several else "python"
    return f"{start} -m moe_emergence.train {shlex.join([*flags, '--resume', 'auto'])}"


def commands_to_look(run: RunFolder, *, is_mixture: bool) -> list[str]:
    """Commands that show what a run that has ended learned."""
    best = shlex.quote(str(run.best_model))
    generate = f'python -m moe_emergence.generate --checkpoint {best} --prompt "def mean(values):"'
    if not is_mixture:
        return [generate]
    analyze = f"python -m moe_emergence.analyze {shlex.quote(str(run.root))}"
    return [f"{analyze}    # writes {run.root}/analysis/report.html", f"{generate} --show-routing"]

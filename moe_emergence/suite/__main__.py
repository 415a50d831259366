"""`python -m moe_emergence.suite`."""

import sys

from moe_emergence.command import run
from moe_emergence.suite import main

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))

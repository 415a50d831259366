"""`python -m moe_emergence.analyze`."""

import sys

from moe_emergence.analyze import main
from moe_emergence.command import run

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))

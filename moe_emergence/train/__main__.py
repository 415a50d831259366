"""`python -m moe_emergence.train`."""

import sys

from moe_emergence.command import run
from moe_emergence.train import main

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))

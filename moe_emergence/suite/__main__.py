"""`python -m moe_emergence.suite`."""

import sys

from moe_emergence.command import run
from moe_emergence.suite import main

sys.exit(run(main, sys.argv[1:]))

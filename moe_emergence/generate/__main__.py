"""`python -m moe_emergence.generate`."""

import sys

from moe_emergence.command import run
from moe_emergence.generate import main

sys.exit(run(main, sys.argv[1:]))

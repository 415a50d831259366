"""`python -m moe_emergence.analyze`."""

import sys

from moe_emergence.analyze import main
from moe_emergence.command import run

sys.exit(run(main, sys.argv[1:]))

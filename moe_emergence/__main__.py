"""`python -m moe_emergence`: the console script `moe-emergence`."""

import sys

from moe_emergence.cli import main

sys.exit(main())

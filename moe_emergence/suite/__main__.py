"""`python -m moe_emergence.suite`."""

from moe_emergence.entry import enter
from moe_emergence.suite import main

if __name__ == "__main__":
    enter(main)

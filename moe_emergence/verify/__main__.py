"""`python -m moe_emergence.verify`."""

from moe_emergence.entry import enter
from moe_emergence.verify import main

if __name__ == "__main__":
    enter(main)

"""`python -m moe_emergence.generate`."""

from moe_emergence.entry import enter
from moe_emergence.generate import main

if __name__ == "__main__":
    enter(main)

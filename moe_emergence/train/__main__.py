"""`python -m moe_emergence.train`."""

from moe_emergence.entry import enter
from moe_emergence.train import main

if __name__ == "__main__":
    enter(main)

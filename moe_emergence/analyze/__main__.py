"""`python -m moe_emergence.analyze`."""

from moe_emergence.analyze import main
from moe_emergence.entry import enter

if __name__ == "__main__":
    enter(main)

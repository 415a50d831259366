"""`python -m moe_emergence`: the console script `moe-emergence`."""

from moe_emergence.cli import main

if __name__ == "__main__":
    main()

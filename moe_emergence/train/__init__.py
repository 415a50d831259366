"""`python -m moe_emergence.train`: upcycle, train, evaluate and resume."""

from moe_emergence.config import RunConfig
from moe_emergence.presets import get_preset

PROG = "python -m moe_emergence.train"


def main(argv: list[str]) -> int:
    """Train as the flags say, starting from `--preset` (demo without one)."""
    from moe_emergence.command import loading, parse

    config = parse(RunConfig, argv, PROG, default=get_preset(preset_name(argv)))

    from moe_emergence.training.launch import start_missing_processes

    start_missing_processes("moe_emergence.train", argv)

    with loading():
        from moe_emergence.train.work import train

    return train(config, argv)


def preset_name(argv: list[str]) -> str:
    """The last `--preset` on the command line; it decides the defaults of all other flags."""
    name = "demo"
    for place, argument in enumerate(argv):
        if argument == "--preset" and place + 1 < len(argv):
            name = argv[place + 1]
        elif argument.startswith("--preset="):
            name = argument.partition("=")[2]
    return name

"""The configurations of a suite's base and variants: a preset, or another variant, with changes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moe_emergence.command import parse
from moe_emergence.config import RunConfig
from moe_emergence.experiments.suite_file import Suite
from moe_emergence.flags import flag
from moe_emergence.presets import get_preset
from moe_emergence.settings import did_you_mean
from moe_emergence.words import written


def read_base(suite: Suite, overrides: Mapping[str, Any]) -> RunConfig | None:
    """The configuration of the dense base, if the suite has one, before seeds and places."""
    if suite.base is None:
        return None
    start = get_preset(suite.preset)
    whole = {"model.moe_layers": (), "model.frozen_layers": 0}
    changes = {**suite.changes, **whole, **suite.base, **overrides}
    return with_changes(start, changes, f"{suite.name}: base")


def read_variants(
    suite: Suite,
    overrides: Mapping[str, Any],
    steps_like: Callable[[RunConfig, RunConfig], int] | None = None,
) -> dict[str, RunConfig]:
    """The configuration of every variant, before seeds and places.

    Args:
        suite: the table.
        overrides: dotted fields on top of everything.
        steps_like: the steps of the second configuration for what the first costs, for variants
            with `flops_of`; without it they keep their own.

    Raises:
        ValueError: for a field that does not exist or a value that cannot be used.
    """
    found: dict[str, RunConfig] = {}
    for variant in suite.variants:
        where = f"{suite.name}: {variant.name}"
        changes = {**variant.changes, **overrides}
        if variant.like is not None:
            config = found[variant.like]
        else:
            config = get_preset(variant.preset or suite.preset)
            changes = {**suite.changes, **changes}
        config = with_changes(config, changes, where)
        if variant.flops_of is not None and steps_like is not None:
            steps = steps_like(found[variant.flops_of], config)
            config = with_changes(config, {"optim.max_steps": steps}, where)
        found[variant.name] = config
    return found


def with_changes(config: RunConfig, changes: Mapping[str, Any], where: str) -> RunConfig:
    """`config` with dotted fields replaced, by values as a flag takes them.

    Raises:
        ValueError: for a field that does not exist or a value that its flag would refuse, naming
            `where` it was asked for.
    """
    known = dotted_fields(config)
    flags: list[str] = []
    for dotted, value in changes.items():
        if dotted not in known:
            meant = did_you_mean(dotted, known)
            raise ValueError(f"{where}: there is no setting {dotted}{meant}")
        words = written(value)
        name = flag(dotted.rpartition(".")[2])
        flags += [f"{name}={words[0]}"] if len(words) == 1 else [name, *words]
    try:
        return parse(RunConfig, flags, "python -m moe_emergence.train", default=config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def dotted_fields(config: Any, prefix: str = "") -> list[str]:
    """Names of the settings in a configuration and in those in it."""
    found: list[str] = []
    for name, value in vars(config).items():
        dotted = prefix + name
        found += dotted_fields(value, f"{dotted}.") if dataclasses.is_dataclass(value) else [dotted]
    return found

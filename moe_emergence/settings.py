"""What all configuration dataclasses share: how they refuse values, and their JSON form."""

import dataclasses
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def check(condition: bool, flag: str, given: object, change: str) -> None:
    """Raise the `ValueError` every bad setting raises: the flag, what was given, what to change."""
    if not condition:
        raise ValueError(f"{flag} {given}: {change}")


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as JSON-ready dictionaries (tuples become lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    result: dict[str, Any] = plain(config)
    return result


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """Rebuild a configuration dataclass; unknown or missing names raise `ValueError`."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
    missing = sorted(hints.keys() - values.keys())
    if missing:
        raise ValueError(f"{cls.__name__} lacks {', '.join(missing)}")
    kwargs: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            kwargs[name] = from_dict(hint, value)
        elif typing.get_origin(hint) is tuple:
            kwargs[name] = tuple(value)
        else:
            kwargs[name] = value
    return cls(**kwargs)

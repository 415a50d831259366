"""What all configuration dataclasses share: how they refuse values, and their JSON form."""

import dataclasses
import difflib
import logging
import typing
from collections.abc import Collection
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


class SettingError(ValueError):
    """A setting that cannot be used; the message is for who gave it."""


def check(condition: bool, flag: str, given: object, change: str) -> None:
    """Raise the error every bad setting raises: the flag, what was given, what to change."""
    if not condition:
        raise SettingError(f"{flag} {given}: {change}")


def check_known(flag: str, given: str, known: Collection[str]) -> None:
    """Refuse a name that is none of those known."""
    change = f"choose from {', '.join(known)}{did_you_mean(given, known)}"
    check(given in known, flag, given, change)


def did_you_mean(given: str, known: Collection[str]) -> str:
    """A question for the known name that is nearest, if any, to end a message with."""
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as JSON-ready dictionaries (tuples become lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    result: dict[str, Any] = plain(config)
    return result


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """Rebuild a configuration dataclass.

    What an earlier version did not write has its default, which every new setting chooses so that
    it changes nothing; it is logged. Raises `ValueError` for unknown names, and for missing ones
    without a default.
    """
    hints = typing.get_type_hints(cls)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
    absent = [field for field in dataclasses.fields(cls) if field.name not in values]  # type: ignore[arg-type]
    missing = [field.name for field in absent if not _has_default(field)]
    if missing:
        raise ValueError(f"{cls.__name__} lacks {', '.join(missing)}")
    if absent:
        names = ", ".join(field.name for field in absent)
        logger.info("%s: saved before there was %s: default taken", cls.__name__, names)
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


def _has_default(field: "dataclasses.Field[Any]") -> bool:
    absent = dataclasses.MISSING
    return field.default is not absent or field.default_factory is not absent

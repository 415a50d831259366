"""What all configuration dataclasses share: how they refuse values, and their JSON form."""

import dataclasses
import difflib
import logging
import math
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from moe_emergence.printable import shortened

T = TypeVar("T")

logger = logging.getLogger(__name__)

LONGEST_SHOWN = 800
"""Characters of a value that messages quote."""
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    types.NoneType: "null",
}


class SettingError(ValueError):
    """A setting that cannot be used; the message is for who gave it."""


def check(condition: bool, flag: str, given: object, change: str) -> None:
    """Raise the error every bad setting raises: the flag, what was given, what to change."""
    if not condition:
        raise SettingError(f"{flag} {_shown(given)}: {change}")


def _shown(given: object) -> str:
    """What was given as a few printable characters."""
    text = shortened(str(given), LONGEST_SHOWN)
    return text if text.isprintable() else ascii(text)


def check_plain(config: Any) -> None:
    """Refuse what no setting may be: numbers without end or beyond 64 bits, text with a NUL or with
    half a character, which no file name and no UTF-8 file can hold."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_plain(value)
            continue
        name = "--" + field.name.replace("_", "-")
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, float):
                check(math.isfinite(one), name, one, "give a finite number")
            elif isinstance(one, int):
                check(
                    abs(one) < 2**63, name, f"of {one.bit_length()} bits", "give a smaller number"
                )
            elif isinstance(one, str):
                whole = "\0" not in one and not any("\ud800" <= c <= "\udfff" for c in one)
                check(whole, name, ascii(one), "give text without NUL, in UTF-8")


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
    it changes nothing; it is logged. Raises `ValueError` for unknown names, for missing ones
    without a default, and for values of another type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{cls.__name__} is {_shown(values)}; give an object with its fields")
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
            continue
        kwargs[name] = tuple(value) if isinstance(value, list) else value
    check_types(cls, kwargs)
    return cls(**kwargs)


def check_types(cls: type[Any], values: Mapping[str, Any]) -> None:
    """Refuse values for fields of `cls` that are of other types than those have."""
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        fits = name in hints and _fits(value, hints[name])
        wanted = _kind(hints[name]) if name in hints else "something that there is"
        check(fits, "--" + name.replace("_", "-"), repr(value), f"give {wanted}")


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of a type that a field may have; a whole number is a number."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return isinstance(value, str) and value in inner
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(one, inner[0]) for one in value)
    if origin is not None:
        return isinstance(value, origin)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _kind(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(map(repr, inner))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_kind, inner))
    if origin is tuple:
        return f"a list, each {_kind(inner[0])}"
    return _KINDS.get(hint, "a table")


def _has_default(field: "dataclasses.Field[Any]") -> bool:
    absent = dataclasses.MISSING
    return field.default is not absent or field.default_factory is not absent

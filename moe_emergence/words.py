"""How settings are written: yes and no, none, numbers with spaces or commas between them.

Flags, suites and docs/contract.md write a value alike. `READERS` are tyro's rules for it.
"""

from collections.abc import Callable
from dataclasses import replace
from types import NoneType
from typing import Any, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

YES, NO, NONE = "yes", "no", "none"

Spec = PrimitiveConstructorSpec[Any]

READERS = ConstructorRegistry()


def written(value: object) -> list[str]:
    """The words that a flag takes for `value`."""
    if isinstance(value, bool):
        return [YES if value else NO]
    if value is None or value in ((), []):
        return [NONE]
    return [str(one) for one in value] if isinstance(value, (tuple, list)) else [str(value)]


@READERS.primitive_rule
def _number(info: PrimitiveTypeInfo) -> Spec | None:
    if info.type not in (int, float):
        return None
    change = "give a whole number" if info.type is int else "give a number"

    def read(words: list[str]) -> Any:
        try:
            return info.type(words[0])
        except ValueError as error:
            raise ValueError(f"{words[0]}: {change}") from error

    return _spec(info.type.__name__.upper(), read, lambda value: isinstance(value, (int, float)))


@READERS.primitive_rule
def _switch(info: PrimitiveTypeInfo) -> Spec | None:
    if info.type is not bool:
        return None
    spec = _spec("{yes,no}", lambda words: words == [YES], lambda value: isinstance(value, bool))
    return replace(spec, choices=(YES, NO))


@READERS.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> Spec | None:
    kinds = get_args(info.type)
    if len(kinds) != 2 or NoneType not in kinds:
        return None
    spec = _of(next(kind for kind in kinds if kind is not NoneType), info)
    return _spec(
        f"{spec.metavar}|none",
        lambda words: None if words == [NONE] else spec.instance_from_str(words),
        lambda value: value is None or bool(spec.is_instance(value)),
    )


@READERS.primitive_rule
def _several(info: PrimitiveTypeInfo) -> Spec | None:
    if info.type_origin is not tuple or tyro.conf.Positional in info.markers:
        return None
    kind = get_args(info.type)[0]
    spec = _of(kind, info)

    def read(words: list[str]) -> Any:
        if words == [NONE]:
            return ()
        if kind in (int, float):
            words = [part for word in words for part in word.split(",") if part]
        return tuple(spec.instance_from_str([word]) for word in words)

    found = _spec(f"{spec.metavar} ...|none", read, lambda value: isinstance(value, tuple))
    choices = None if spec.choices is None else (*spec.choices, NONE)
    return replace(found, nargs="*", choices=choices)


def _of(kind: Any, info: PrimitiveTypeInfo) -> Spec:
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, info.markers))
    assert isinstance(spec, PrimitiveConstructorSpec)
    return spec


def _spec(
    metavar: str, read: Callable[[list[str]], Any], is_instance: Callable[[Any], bool]
) -> Spec:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=is_instance,
        str_from_instance=written,
    )

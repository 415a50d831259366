"""Suites as data: the TOML tables in `suites/`, or one of the user's own, checked and typed.

A suite starts every run from a preset with `[changes]`. A variant is another preset, or the
variant it is `like`, with its own `changes`; nothing else can make two runs differ.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from moe_emergence.experiments.description import BASE, Comparison
from moe_emergence.settings import check_types, did_you_mean

T = TypeVar("T")

SUITES = Path(__file__).parent / "suites"


@dataclass(frozen=True)
class SuiteVariant:
    """A row of a suite: where its configuration comes from, and what it is compared with."""

    name: str
    question: str = ""
    preset: str | None = None
    """In place of the suite's."""
    like: str | None = None
    """An earlier variant, from which only `changes` differ."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Dotted fields of the configuration and their values."""
    compare_with: str | None = None
    flops_of: str | None = None
    """An earlier variant: as many steps as its training FLOPs pay for."""


@dataclass(frozen=True)
class Suite:
    """A table of presets, overrides and seeds."""

    name: str
    question: str
    preset: str
    seeds: tuple[int, ...]
    changes: Mapping[str, Any]
    """Of every run, on top of the preset."""
    base: Mapping[str, Any] | None
    """Changes of the dense base that is pretrained for every seed and shared by all its variants;
    None where variants start from `model.base`."""
    variants: tuple[SuiteVariant, ...]
    comparisons: tuple[Comparison, ...]
    test_modules: tuple[str, ...] = ()
    """Variants whose experts are tested by ablation when a run ends (`analysis.modules`)."""


def built_in() -> list[str]:
    """Names of the suites that come with the package."""
    return sorted(path.stem for path in SUITES.glob("*.toml"))


def load_suite(name: str) -> Suite:
    """The suite of that name, or in that TOML file.

    Raises:
        ValueError: when there is none, or it does not make sense; the message names the file.
    """
    path = Path(name) if name.endswith(".toml") else SUITES / f"{name}.toml"
    if not path.is_file():
        raise ValueError(
            f"suite {name}: there is none; give one of {', '.join(built_in())}, or a .toml file"
            f"{did_you_mean(name, built_in())}"
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not TOML ({error})") from error
    try:
        suite = _suite(path.stem, values)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not a suite ({error}); see {SUITES / 'demo.toml'}") from error
    _check(suite, path)
    return suite


def _suite(name: str, values: dict[str, Any]) -> Suite:
    base = values.pop("base", None)
    variants = tuple(_typed(SuiteVariant, entry) for entry in values.pop("variants"))
    added = tuple(_typed(Comparison, entry) for entry in values.pop("comparisons", ()))
    own = tuple(
        Comparison(v.name, v.compare_with, v.question)
        for v in variants
        if v.compare_with is not None
    )
    suite = Suite(
        name,
        values.pop("question", ""),
        values.pop("preset"),
        tuple(values.pop("seeds")),
        values.pop("changes", {}),
        None if base is None else dict(base["changes"]),
        variants,
        own + added,
        tuple(values.pop("test_modules", ())),
    )
    if values:
        raise KeyError(f"unknown {', '.join(sorted(values))}")
    plain = ("question", "preset", "seeds", "changes", "base", "test_modules")
    check_types(Suite, {name: getattr(suite, name) for name in plain})
    return suite


def _typed(cls: type[T], entry: dict[str, Any]) -> T:
    check_types(cls, entry)
    return cls(**entry)


def _check(suite: Suite, path: Path) -> None:
    def refuse(condition: bool, message: str) -> None:
        if condition:
            raise ValueError(f"{path}: {message}")

    refuse(not suite.variants, "has no variants")
    refuse(not suite.seeds, "has no seeds")
    refuse(len(set(suite.seeds)) < len(suite.seeds), "names a seed twice")
    known: set[str] = set()
    for variant in suite.variants:
        name = variant.name
        refuse(not name or not name.replace("-", "").isalnum(), f"{name!r} is no plain name")
        refuse(name in (*known, BASE), f"{name} is there twice")
        refuse(bool(variant.like and variant.preset), f"{name} has both like and preset")
        for other in (variant.like, variant.flops_of):
            refuse(other not in (None, *known), f"{name} builds on {other}, which is not above it")
        known.add(name)
    for name in suite.test_modules:
        refuse(name not in known, f"tests the modules of {name}, which is not one of its variants")
    for pair in suite.comparisons:
        for name in (pair.variant, pair.control):
            refuse(name not in known, f"compares {name}, which is not one of its variants")
        refuse(pair.matched not in ("steps", "flops"), f"{pair.variant}: matched {pair.matched!r}")

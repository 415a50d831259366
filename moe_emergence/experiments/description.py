"""What a suite is meant to compare: `suite.json` as dataclasses, and where its files are."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from moe_emergence.run_folder import RunFolder, read_json
from moe_emergence.settings import check, check_known, check_types

MARGIN = 0.01
"""Nats per token below which a loss difference is taken to be none: 1% in perplexity."""

Matching = Literal["steps", "flops"]
BASE = "base"
"""Name of the dense base in tables and folders; it is the start of the variants, not one of them.
"""


@dataclass(frozen=True)
class Variant:
    """A configuration of the suite, run once for every seed."""

    name: str
    question: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    """Dotted fields of the configuration and their values."""


@dataclass(frozen=True)
class Comparison:
    """A variant and the one control it is measured against."""

    variant: str
    control: str
    question: str = ""
    matched: Matching = "steps"
    """What the two have in common: the number of steps, or the training FLOPs."""


@dataclass(frozen=True)
class SuiteFolder:
    """A suite's folder and what `suite.json` in it says."""

    root: Path
    name: str
    question: str
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    comparisons: tuple[Comparison, ...]
    command: str
    """That made the runs."""

    def only(self, names: Sequence[str]) -> "SuiteFolder":
        """These variants and the comparisons among them; `ValueError` for one it lacks."""
        known = [variant.name for variant in self.variants]
        for name in names:
            check_known("--only", name, known)
        kept = {*names, BASE}
        return replace(
            self,
            variants=tuple(variant for variant in self.variants if variant.name in kept),
            comparisons=tuple(c for c in self.comparisons if {c.variant, c.control} <= kept),
        )

    def run(self, variant: str, seed: int) -> RunFolder:
        """The run folder of a variant (or of `BASE`) and a seed."""
        return RunFolder(self.root / variant / f"seed-{seed}")

    def routing(self, variant: str, seed: int) -> Path:
        """The final model's routing of the evaluation blocks."""
        return self.run(variant, seed).routing


def read_suite(root: Path) -> SuiteFolder:
    """Read `suite.json` of a suite folder.

    Raises:
        ValueError: when it is missing or lacks something, naming the file.
    """
    path = root / "suite.json"
    values = read_json(path)
    try:
        variants = tuple(
            Variant(entry["name"], entry.get("question") or "", dict(entry.get("changes") or {}))
            for entry in values["variants"]
        )
        suite = SuiteFolder(
            root,
            values["name"],
            values.get("question") or "",
            tuple(values["seeds"]),
            variants,
            tuple(_comparisons(values)),
            values.get("command") or f"python -m moe_emergence.suite run {values['name']}",
        )
        check_types(SuiteFolder, {n: getattr(suite, n) for n in ("name", "question", "seeds")})
        for one in (*suite.variants, *suite.comparisons):
            check_types(type(one), vars(one))
        for variant in variants:
            plain = variant.name.replace("-", "").isalnum()
            check(plain, "name", repr(variant.name), "give a plain name")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not the description of a suite ({error!r})") from error
    known = {variant.name for variant in variants}
    for comparison in suite.comparisons:
        unknown = {comparison.variant} - known | {comparison.control} - known - {BASE}
        if unknown:
            raise ValueError(f"{path}: compares {unknown.pop()}, which is not one of its variants")
    return suite


def _comparisons(values: dict[str, Any]) -> list[Comparison]:
    """Every variant with its `compare_with`, and what `comparisons` adds; each pair once."""
    entries = [
        {"variant": entry["name"], "control": entry["compare_with"], **_given(entry)}
        for entry in values["variants"]
        if entry.get("compare_with")
    ]
    found: dict[tuple[str, str], Comparison] = {}
    for entry in [*entries, *(values.get("comparisons") or [])]:
        pair = entry["variant"], entry["control"]
        matched: Matching = "flops" if entry.get("matched") == "flops" else "steps"
        found[pair] = Comparison(*pair, entry.get("question") or "", matched)
    return list(found.values())


def _given(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in ("question", "matched") if name in entry}

"""Who wins: rows of measurements as a text that a terminal shows and Markdown reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from benchmarks.results import Row
from benchmarks.tables import short

REFERENCES = {"training": "predecessor"}
"""What `speedup` is over, where it is not `sequential`."""


@dataclass(frozen=True)
class Group:
    """Rows that were measured in turns."""

    suite: str
    name: str
    phase: str
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """Suite, sizes, phase and rounds, in one line."""
        rounds = max(row.rounds for row in self.rows)
        return f"{self.suite} {self.name}, {self.phase}, {rounds} rounds"

    @property
    def ranking(self) -> list[Row]:
        """Those that passed, the fastest first."""
        passed = [row for row in self.rows if row.verdict == "passed" and row.median_s is not None]
        return sorted(passed, key=lambda row: row.median_s or 0.0)

    @property
    def floor(self) -> list[Row]:
        """What is timed beside them and computes something else."""
        return [row for row in self.rows if row.verdict == "floor" and row.median_s is not None]

    @property
    def reference(self) -> str:
        """The contestant that `speedup` is over."""
        return REFERENCES.get(self.suite, "sequential")


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """Rows by what they were measured with, in their order."""

    def key(row: Row) -> tuple[str, str, str]:
        # a group of the scaling suite has a size after the other
        sweep = row.parameters.get("sweep")
        size = f" {sweep}={row.parameters[sweep]}" if sweep else ""
        return row.suite, row.group + size, row.phase

    return [Group(*of, tuple(found)) for of, found in groupby(rows, key)]


def comparison(rows: Sequence[Row]) -> str:
    """Rankings of whole passes, who is not in them and why, and who wins each group and phase."""
    groups = groups_of(rows)
    parts = [
        f"## {group.title}\n\n{_ranking(group)}"
        for group in groups
        if group.suite != "scaling" and group.phase in ("full", "step") and group.ranking
    ]
    left_out = _left_out(groups)
    if left_out:
        parts.append(f"## Not compared, and why\n\n{left_out}")
    parts.append(f"## Winners\n\n{_winners(groups)}\n\n{LEGEND}")
    return "\n\n".join(parts) + "\n"


LEGEND = """\
Times are medians in ms over rounds in which all took turns, with quartiles. Ratios are medians and
quartiles of the other's time in a round over this one's: above 1 this one is faster; `level` where
that is so in fewer than three of four rounds. Ranked are those whose output and gradients passed
the comparison with fp64 (training: whose first loss and gradient norm are right). A floor does the
same active FLOPs without routing."""


def _ranking(group: Group) -> str:
    lines = [("", "contestant", "ms", f"over {group.reference}", "over the next")]
    for place, row in enumerate(group.ranking, start=1):
        lines.append((str(place), row.contestant, _time(row), _speedup(row), _lead(row)))
    for row in group.floor:
        lines.append(("", f"{row.contestant} (floor)", _time(row), _speedup(row), ""))
    return _table(lines)


def _winners(groups: Sequence[Group]) -> str:
    lines = [("group", "phase", "winner", "ms", "over the next", "over the reference")]
    for group in groups:
        won = ("none", "", "", "")
        if group.ranking:
            first = group.ranking[0]
            is_reference = first.contestant == group.reference
            over = "itself" if is_reference else f"{group.reference} {_speedup(first)}"
            won = (first.contestant, _time(first), _lead(first), over)
        lines.append((f"{group.suite} {group.name}", group.phase, *won))
    return _table(lines)


def _left_out(groups: Sequence[Group]) -> str:
    """By contestant, verdict and reason, with the groups that it holds for; empty for nobody."""
    found: dict[tuple[str, str, str], dict[str, None]] = {}
    for group in groups:
        for row in group.rows:
            if row.verdict not in ("passed", "floor"):
                key = (row.contestant, row.verdict, row.note)
                found.setdefault(key, {})[f"{group.suite} {group.name}"] = None
    every = len({group.name for group in groups if group.suite == "layer"})
    lines = []
    for (contestant, verdict, note), where in sorted(found.items(), key=lambda item: item[0][0]):
        places = "every layer" if len(where) == every > 1 else ", ".join(where)
        lines.append(f"- {contestant}: {verdict} ({places}): {note}")
    return "\n".join(lines)


def _time(row: Row) -> str:
    assert row.median_s is not None
    assert row.quartiles_s is not None
    low, high = (short(s * 1e3) for s in row.quartiles_s)
    return f"{short(row.median_s * 1e3)} ({low}-{high})"


def _speedup(row: Row) -> str:
    return _ratio(row.speedup, row.speedup_quartiles)


def _lead(row: Row) -> str:
    if row.lead_quartiles is None:
        return ""
    level = ", level" if row.lead_quartiles[0] <= 1 else ""
    return f"{row.next_slower} {_ratio(row.lead, row.lead_quartiles)}{level}"


def _ratio(value: float | None, quartiles: tuple[float, float] | None) -> str:
    if value is None or quartiles is None:
        return ""
    return f"{value:.2f} ({quartiles[0]:.2f}-{quartiles[1]:.2f})"


def _table(lines: Sequence[tuple[str, ...]]) -> str:
    """Markdown with columns as wide as what they hold; the first line is the head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = tuple("-" * width for width in widths)
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in (lines[0], rule, *lines[1:])
    )

"""Data frames as Markdown, and numbers as people read them."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from statsmodels.stats.proportion import proportion_confint


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns after the first are aligned to the right where all are numbers."""
    numeric = [
        any(row[place] for row in rows) and all(_is_number(row[place]) for row in rows)
        for place in range(len(header))
    ]
    ruler = ["---:" if number else "---" for number in numeric]
    lines = [header, ruler, *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def _is_number(text: str) -> bool:
    return text in ("", "–") or text.lstrip("+-<−").split(" ")[0].replace(",", "")[:1].isdigit()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def number(value: float, digits: int = 4, *, signed: bool = False) -> str:
    """A number with so many digits after the point; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if signed else ''},.{digits}f}"


def probability(value: float) -> str:
    """A p-value: three digits, or the bound it is below."""
    if value is None or math.isnan(value):
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def interval(low: float, high: float, digits: int = 4, *, signed: bool = True) -> str:
    """Both ends of an interval, or a dash."""
    if math.isnan(low) or math.isnan(high):
        return "–"
    return f"{number(low, digits, signed=signed)} to {number(high, digits, signed=signed)}"


def mean_and_spread(values: pd.Series, digits: int = 4) -> str:
    """Mean ± standard deviation over seeds."""
    mean = number(float(values.mean()), digits)
    return f"{mean} ± {number(float(values.std(ddof=1)), digits)}" if len(values) > 1 else mean


def share_of(count: int, total: int) -> str:
    """A count of runs, with the 95% Wilson interval of the share it estimates."""
    if not total:
        return "–"
    low, high = proportion_confint(count, total, method="wilson")
    return f"{count} of {total} ({100 * low:.0f}–{100 * high:.0f}%)"


def plain(value: Any) -> str:
    """A configuration value as one types it."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)

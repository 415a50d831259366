"""Results as Markdown: every row, those that lose like those that win."""

from collections.abc import Iterable, Sequence

from benchmarks.projection import projection_table
from benchmarks.results import Document, Row
from benchmarks.scaling import Fit, fit_exponent

COLUMNS = (
    ("contestant", "contestant"),
    ("verdict", "verdict"),
    ("median", "ms"),
    ("quartiles", "quartiles"),
    ("speedup", "speed-up"),
    ("graph", "graph ms"),
    ("roofline", "of roofline"),
    ("tokens", "tokens/s"),
    ("saved", "saved MB"),
    ("peak", "peak MB"),
    ("note", "note"),
)


def markdown(documents: Sequence[Document], figures: Sequence[str] = ()) -> str:
    """The whole report; `figures` are paths relative to it."""
    parts = ["# Benchmark results", _legend()]
    parts += [f"![{name}]({name})" for name in figures]
    for document in documents:
        parts.append(_origin(document))
        rows = document.rows
        for suite in dict.fromkeys(row.suite for row in rows if row.suite != "scaling"):
            parts.append(f"## {suite.capitalize()} on {document.environment['device_name']}")
            groups = dict.fromkeys((r.group, r.phase) for r in rows if r.suite == suite)
            for group, phase in groups:
                own = [r for r in rows if (r.suite, r.group, r.phase) == (suite, group, phase)]
                parts += [f"### {group}, {phase}", table(own)]
        projected = projection_table(rows)
        if projected is not None:
            parts += ["### The full-size runs at these speeds, evaluation not counted", projected]
        scaling = [row for row in rows if row.suite == "scaling"]
        if scaling:
            parts += [f"## Scaling on {document.environment['device_name']}", _fits(scaling)]
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Row]) -> str:
    """One Markdown table; columns that are empty throughout are left out."""
    cells = [_cells(row) for row in rows]
    kept = [(key, title) for key, title in COLUMNS if any(c[key] for c in cells)]
    lines = ["| " + " | ".join(title for _, title in kept) + " |", "|---" * len(kept) + "|"]
    lines += ["| " + " | ".join(c[key] for key, _ in kept) + " |" for c in cells]
    return "\n".join(lines)


def fits(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], Fit]:
    """Exponents by (sweep, dtype, contestant, quantity) where at least two sizes were measured."""
    series: dict[tuple[str, str, str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row.suite != "scaling" or not row.is_ranked:
            continue
        sweep, dtype = row.parameters["sweep"], row.parameters["dtype"]
        for quantity, value in (("seconds", row.median_s), ("saved bytes", row.saved_bytes)):
            if value:
                key = (sweep, dtype, row.contestant, quantity)
                series.setdefault(key, []).append((row.parameters[sweep], value))
    return {
        key: fit_exponent(*zip(*points, strict=True))
        for key, points in series.items()
        if len({x for x, _ in points}) > 1
    }


def _fits(rows: Sequence[Row]) -> str:
    lines = [
        "Power laws fitted to a full pass: quantity ~ size^exponent, ± one standard error.",
        "",
        "| sweep | dtype | contestant | quantity | exponent | ± |",
        "|---|---|---|---|---|---|",
    ]
    for (sweep, dtype, contestant, quantity), fit in fits(rows).items():
        numbers = f"{fit.exponent:z.3f} | {fit.standard_error:.3f}"
        lines.append(f"| {sweep} | {dtype} | {contestant} | {quantity} | {numbers} |")
    return "\n".join(lines)


def _cells(row: Row) -> dict[str, str]:
    ranked = row.is_ranked
    cells = dict.fromkeys((key for key, _ in COLUMNS), "")
    cells |= {"contestant": row.contestant, "verdict": row.verdict}
    cells["note"] = row.note.replace("|", "/")
    if row.median_s is not None:
        cells["median"] = short(row.median_s * 1e3)
    if row.quartiles_s is not None:
        cells["quartiles"] = "–".join(short(s * 1e3) for s in row.quartiles_s)
    if row.speedup is not None and row.speedup_quartiles is not None and ranked:
        low, high = row.speedup_quartiles
        cells["speedup"] = f"{row.speedup:.2f} ({low:.2f}–{high:.2f})"
    if row.graph_s is not None:
        cells["graph"] = short(row.graph_s * 1e3)
    if row.roofline_fraction is not None and ranked:
        cells["roofline"] = f"{row.roofline_fraction:.0%}"
    if row.tokens_per_s is not None and row.suite == "training":
        cells["tokens"] = f"{row.tokens_per_s:,.0f}"
    for key, size in (("saved", row.saved_bytes), ("peak", row.peak_bytes)):
        if size is not None:
            cells[key] = short(size / 1e6)
    return cells


def short(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _origin(document: Document) -> str:
    env = document.environment
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
    driver = f", driver {env['driver']}" if env.get("driver") else ""
    where = f"{env['device_name']} ({env['threads']} of {env['cores']} CPU threads{driver})"
    commit = (env.get("commit") or "unknown")[:12]
    return (
        f"Measured on {where}, Python {env['python']}, {packages}; commit {commit}, "
        f"{env['date']}:\n\n```\n{env['command']}\n```"
    )


def _legend() -> str:
    return (
        "Times are medians over rounds in which the contestants of a table took turns; the "
        "speed-up is the median over rounds of the reference's time (`sequential`; for training "
        "`predecessor`) over the contestant's, with quartiles. A speed-up below 1 is a loss. Only "
        "rows whose output and gradients passed the comparison with fp64 are ranked: `imprecise` "
        "rows are right but further from fp64 than the sequential path allows, and `failed` rows "
        "are wrong and not timed. `floor` rows do the same active FLOPs without routing.\n\n"
        "`graph ms` is the time as a CUDA graph. `of roofline` is the time that the device's "
        "measured matrix-product rate and copy bandwidth allow, over the time taken (in training "
        "the rate alone). `saved MB` is kept for the backward pass, `peak MB` the device memory "
        "that one pass adds; in training it is the whole process's peak (resident on a CPU)."
    )

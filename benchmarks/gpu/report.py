"""Tables and a figure from what the program measured: `python -m benchmarks.gpu report`."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.program import Fields, read_journal
from moe_emergence.run_folder import losses_by_domain

PATHS = ("fused", "grouped", "sequential", "dense-floor")


def write_report(source: Path, folder: Path) -> Path:
    """`NAME.md` and `NAME.png` in `folder` from `NAME.json`; the path of the Markdown.

    Raises:
        ValueError: for a file that `run` did not write.
    """
    journal = read_journal(source)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {name: stage["rows"] for name, stage in journal["stages"].items()}
    env = journal["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
    parts = [
        f"# {source.stem}: {env['device_name']}\n",
        f"`{env['command']}` at commit `{env['commit']}`, {env['date'][:10]}; driver "
        f"{env['driver']}, CUDA {env['cuda']}, Python {env['python']}, {versions}.\n",
        *_stages(journal["stages"]),
        *_apart(rows.get("taken-apart", [])),
        *_suite("Layers", rows.get("layers", [])),
        *_correctness(rows.get("correctness", [])),
        *_suite("Training", rows.get("training", [])),
        *_runs([*rows.get("train", []), *rows.get("runs", [])]),
        *_sweep(rows.get("sweep", [])),
    ]
    if _draw(rows.get("taken-apart", []), folder / f"{source.stem}.png", env["device_name"]):
        parts.insert(2, f"![The layer's kernels]({source.stem}.png)\n")
    path = folder / f"{source.stem}.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def _us(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:,.0f}"


def _stages(stages: dict[str, Fields]) -> list[str]:
    rows = []
    for name, stage in stages.items():
        lines = (stage.get("error") or "").strip().splitlines()
        rows.append((name, stage["state"], stage.get("seconds", ""), lines[-1] if lines else ""))
    return [table(("stage", "state", "seconds", "why"), rows)]


def _apart(rows: Sequence[Fields]) -> list[str]:
    if not rows:
        return []
    parts = ["## The layer, taken apart\n"]
    rates = next((r for r in rows if r.get("what") == "rates"), None)
    if rates:
        parts.append(
            f"A product of 8192 x 8192 matrices ran at {rates['flops_per_s'] / 1e12:.0f} TFLOP/s, "
            f"a copy at {rates['bytes_per_s'] / 1e12:.2f} TB/s. Microseconds of the device (a CUDA "
            "graph's replay, L2 overwritten before) and of the host (until the call returns).\n"
        )
    cells = [
        (r["shape"], r["path"], r["phase"], _us(r.get("graph_s")) or "no graph", _us(r["host_s"]))
        for r in rows
        if r.get("host_s")
    ]
    parts.append(table(("shape", "path", "phase", "device", "host"), cells))
    ours = [(r["shape"], r["kernel"], r["calls"], r["us"]) for r in _kernels(rows)]
    parts.append("Forward and backward of `fused`, kernel by kernel (profiler, L2 warm):\n")
    parts.append(table(("shape", "kernel", "calls", "us"), ours))
    return parts


def _runs(rows: Sequence[Fields]) -> list[str]:
    if not rows:
        return []
    found = (losses_by_domain(row.get("last", {})) for row in rows)
    domains = list(dict.fromkeys(domain for by_domain in found for domain in by_domain))
    names = ("eval/lm_loss", *(f"eval/lm_loss_{domain}" for domain in domains))
    cells = []
    for row in rows:
        if row["run"] == "projection":
            continue
        last = row.get("last", {})
        speed = f"{row['tokens_per_sec']:,.0f}" if "tokens_per_sec" in row else ""
        ended = row.get("status") or row["exit"]
        losses = [f"{last[name]:.4f}" if name in last else "" for name in names]
        cells.append((row["run"], row["steps"], ended, row["seconds"], speed, *losses))
    head = ("run", "steps", "ended", "seconds", "tokens/s", "lm_loss", *domains)
    return ["## Runs of the trainer\n", table(head, cells)]


def _kernels(rows: Sequence[Fields]) -> list[Fields]:
    return [r for r in rows if r.get("path") == "fused" and r.get("kernel", "").startswith("_")]


def _suite(title: str, rows: Sequence[Fields]) -> list[str]:
    if not rows:
        return []
    cells = [
        (
            r["group"],
            r["phase"],
            r["contestant"],
            r["verdict"],
            _us(r.get("median_s")),
            _us(r.get("graph_s")),
            f"{r['tokens_per_s']:,.0f}" if "tokens_per_s" in r else "",
            f"{r['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in r else "",
            r.get("note", ""),
        )
        for r in rows
    ]
    head = (
        "group",
        "phase",
        "contestant",
        "verdict",
        "eager, us",
        "graph, us",
        "tokens/s",
        "peak MB",
    )
    return [f"## {title}\n", table((*head, "note"), cells)]


def _correctness(rows: Sequence[Fields]) -> list[str]:
    if not rows:
        return []
    cells = [
        (r["shape"], r["dtype"], r["path"], r["verdict"], f"{r['worst_ratio']:.2f}")
        if r.get("worst_ratio") is not None
        else (r["shape"], r["dtype"], r["path"], r["verdict"], r.get("note", ""))
        for r in sorted(rows, key=lambda r: (r["dtype"], r["shape"], r["path"]))
    ]
    about = (
        "The worst of output and gradients: its distance from fp64 as a multiple of that of the "
        "sequential path, at least half an ulp.\n"
    )
    head = ("shape", "dtype", "path", "verdict", "ratio or reason")
    return ["## Correctness\n", about, table(head, cells)]


def _sweep(rows: Sequence[Fields]) -> list[str]:
    groups: dict[tuple[str, str], list[Fields]] = {}
    for row in rows:
        if row.get("seconds") and "product" in row:
            groups.setdefault((row["shape"], row["product"]), []).append(row)
    if not groups:
        return []
    cells = []
    for (shape, product), found in groups.items():
        default = found[0]
        best = sorted(found, key=lambda r: float(r["seconds"]))[:3]
        cells += [
            (shape, product, row["config"], _us(row["seconds"]), row["tflops"], row["registers"])
            for row in [default, *(b for b in best if b is not default)]
        ]
    head = ("shape", "product", "configuration", "us", "TFLOP/s", "registers")
    about = "Of every product the default of that commit, then the three fastest; kernels alone.\n"
    parts = ["## Configurations\n", about, table(head, cells)]
    whole = [
        (r["shape"], r["plan"], r.get("as", "eager"), _us(r["seconds"]), r["tflops"])
        for r in rows
        if "plan" in r
    ]
    if whole:
        parts.append("Forward and backward of the layer, the plans in turns:\n")
        parts.append(table(("shape", "plan", "as", "us", "TFLOP/s"), whole))
    return parts


def _draw(rows: Sequence[Fields], path: Path, device: str) -> bool:
    """Bars of the device's time by path and shape, ours divided by kernel."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    full = [r for r in rows if r.get("phase") == "full" and r.get("graph_s")]
    shapes = list(dict.fromkeys(r["shape"] for r in full))
    if not shapes:
        return False
    names = list(dict.fromkeys(k["kernel"] for k in _kernels(rows)))
    colours = dict(zip(names, mpl.colormaps["tab20"].colors, strict=False))  # type: ignore[attr-defined]
    figure, axes = plt.subplots(1, len(shapes), figsize=(4.2 * len(shapes), 4.4), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        bars = {r["path"]: 1e6 * float(r["graph_s"]) for r in full if r["shape"] == shape}
        paths = [p for p in PATHS if p in bars]
        axis.bar(paths, [bars[p] for p in paths], color="#cccccc")
        bottom = 0.0
        for kernel in (k for k in _kernels(rows) if k["shape"] == shape):
            colour = colours[kernel["kernel"]]
            axis.bar("fused", kernel["us"], bottom=bottom, color=colour)
            bottom += kernel["us"]
        axis.set_title(shape)
        axis.set_ylabel("device, us, forward and backward")
        axis.tick_params(axis="x", rotation=20)
    patches = [
        mpl.patches.Patch(color=c, label=n.removeprefix("_").removesuffix("_kernel"))
        for n, c in colours.items()
    ]
    axes[0][-1].legend(handles=patches, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(f"{device}: graph replays (grey) and our kernels (colours)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True

"""`report.html`: one file with everything in it, written from the files of an analysis folder."""

import base64
import gzip
import json
import logging
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from moe_emergence.analysis.counts import NULL_ROUTERS
from moe_emergence.analysis.palette import FOR_ANY_EYE, PALETTE
from moe_emergence.analysis.report.curves import curve_data
from moe_emergence.analysis.report.experts import card_data, expert_cards
from moe_emergence.analysis.report.heatmaps import heatmap_data
from moe_emergence.analysis.report.summary import summarise
from moe_emergence.analysis.report.verdict import type_sentence
from moe_emergence.analysis.tidy import FIGURES, read_tables
from moe_emergence.disk import write_text
from moe_emergence.run_folder import read_json

MOST_BYTES = 5_000_000
SCRIPTS = ("base.js", "experts.js", "explorer.js", "charts.js", "start.js")

logger = logging.getLogger(__name__)


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` from `analysis.json`, `explorer.json` and `tables/` beside it.

    The page needs no network: Plotly and the numbers are in it, compressed, and are inflated by
    the browser (`DecompressionStream`, in all current ones). Sections without a table are left out.

    Raises:
        ValueError: when `analysis.json` or a table cannot be read.
        RunError: when the disk is full or not writable.
    """
    about = read_json(folder / "analysis.json")
    tables = read_tables(folder)
    explorer = folder / "explorer.json"
    payload = {
        "heatmaps": heatmap_data(tables),
        "curves": curve_data(tables),
        "experts": {
            run["name"]: card_data(expert_cards(tables, run["name"])) for run in about["runs"]
        },
        "explorer": read_json(explorer)["runs"] if explorer.is_file() else [],
        "colours": PALETTE,
        "anyEye": FOR_ANY_EYE,
    }
    figures = sorted(path.name for path in (folder / FIGURES).glob("*.[pg][ni][gf]"))
    page = render(about, tables, payload, figures)
    path = folder / "report.html"
    if len(page.encode()) > MOST_BYTES:
        logger.warning("%s has %.1f MB: name fewer sources", path, len(page.encode()) / 1e6)
    write_text(path, page)
    return path


def render(
    about: dict[str, Any], tables: dict[str, Any], payload: dict[str, Any], figures: list[str]
) -> str:
    """The page as text; everything that is not ours in it is escaped or compressed."""
    own = resources.files("moe_emergence.analysis.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((own / "report.html.j2").read_text(encoding="utf-8"))
    # NaN is no JSON; lone surrogates are no UTF-8, and JSON escapes them
    numbers = json.dumps(payload, allow_nan=False, separators=(",", ":"), default=str)
    return template.render(
        about=about,
        findings=summarise(about["runs"], tables),
        type_sentence=type_sentence,
        null_routers=NULL_ROUTERS,
        tables=sorted(tables),
        figures=figures,
        css=(own / "report.css").read_text(encoding="utf-8"),
        js="".join((own / name).read_text(encoding="utf-8") for name in SCRIPTS),
        plotly=packed(get_plotlyjs()),
        payload=packed(numbers),
        has={
            "experts": any(payload["experts"].values()),
            **{name: bool(payload[name]) for name in ("heatmaps", "curves", "explorer")},
        },
    )


def packed(text: str) -> str:
    """gzip in base64; without a date, so that equal pages are equal files."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()

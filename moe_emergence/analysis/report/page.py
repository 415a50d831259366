"""`report.html`: one file with everything in it, written from the files of an analysis folder."""

import base64
import contextlib
import gzip
import json
import logging
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from moe_emergence.analysis.report.payload import (
    OKABE_ITO,
    curve_data,
    heatmap_data,
    vocabulary_data,
)
from moe_emergence.analysis.report.summary import summarise
from moe_emergence.analysis.tidy import read_tables
from moe_emergence.run_folder import disk_error, read_json

MOST_BYTES = 5_000_000

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
        "vocabulary": vocabulary_data(tables),
        "explorer": read_json(explorer)["runs"] if explorer.is_file() else [],
        "colours": OKABE_ITO,
    }
    page = render(about, tables, payload)
    path = folder / "report.html"
    if len(page.encode()) > MOST_BYTES:
        logger.warning("%s has %.1f MB: name fewer sources", path, len(page.encode()) / 1e6)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise disk_error(path, error) from error
    return path


def render(about: dict[str, Any], tables: dict[str, Any], payload: dict[str, Any]) -> str:
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
        tables=sorted(tables),
        css=(own / "report.css").read_text(encoding="utf-8"),
        js=(own / "report.js").read_text(encoding="utf-8"),
        plotly=packed(get_plotlyjs()),
        payload=packed(numbers),
        has={name: bool(payload[name]) for name in ("heatmaps", "curves", "explorer")},
    )


def packed(text: str) -> str:
    """gzip in base64; without a date, so that equal pages are equal files."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()

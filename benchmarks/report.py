"""From result files to a report: `python -m benchmarks.report JSON... --out docs/results/NAME`.

Takes what `benchmarks.grid`, `benchmarks.scaling` and `pytest --benchmark-only` write, and makes a
folder with `report.md` and its figures as PNG and SVG.
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import start_logging
from benchmarks.plots import draw_all
from benchmarks.results import read_document
from benchmarks.tables import markdown

logger = logging.getLogger(__name__)


def build_report(sources: Sequence[Path], folder: Path) -> Path:
    """Write the report of `sources` into `folder`; the path of its Markdown.

    Raises:
        ValueError: for a source that is no result file.
    """
    documents = [read_document(path) for path in sources]
    folder.mkdir(parents=True, exist_ok=True)
    figures: list[str] = []
    seen: Counter[str] = Counter()
    for document in documents:
        device = str(document.environment["device"])
        seen[device] += 1
        suffix = device if seen[device] == 1 else f"{device}-{seen[device]}"
        figures += draw_all(document, folder, suffix)
    report = folder / "report.md"
    report.write_text(markdown(documents, figures), encoding="utf-8")
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("sources", nargs="+", type=Path, metavar="JSON", help="result files")
    parser.add_argument("--out", required=True, type=Path, help="folder for the report")
    options = parser.parse_args(arguments)
    start_logging()
    try:
        report = build_report(options.sources, options.out)
    except ValueError as error:
        sys.exit(str(error))
    logger.info("wrote %s", report)


if __name__ == "__main__":
    main()

"""A Markdown page of an analysis' figures: each with a sentence and its numbers."""

import os
from pathlib import Path

from moe_emergence.analysis.figures import FIGURES
from moe_emergence.analysis.figures.write import TRAJECTORY
from moe_emergence.analysis.tidy import FIGURES as FOLDER
from moe_emergence.analysis.tidy import TABLES
from moe_emergence.disk import clear_unfinished, write_text
from moe_emergence.printable import inert
from moe_emergence.run_folder import read_json


def write_gallery(folder: Path, page: Path) -> Path:
    """Write `page` with every figure that `folder/figures` has; links are relative to the page.

    Raises:
        RunError: when the page cannot be written.
    """
    about = read_json(folder / "analysis.json")
    link = Path(os.path.relpath(folder.resolve(), page.parent.resolve())).as_posix()
    names = ", ".join(_code(run["name"]) for run in about["runs"])
    parts = [
        "# Gallery",
        f"What `analyze` draws, of {names}: {about['tokens']:,} tokens of {about['data']}. Numbers "
        "are in the table that each figure names.",
        f"```bash\n{about['command']}\n```",
        *(
            f"{_code(run['name'])} is {_code(run['made_by'])}."
            for run in about["runs"]
            if run["made_by"]
        ),
    ]
    shown = {name: (one.caption, one.table, "png") for name, one in FIGURES.items()}
    caption = "Share of each domain's assignments per expert, over the checkpoints of training."
    shown[TRAJECTORY] = (caption, TRAJECTORY, "gif")
    for name, (caption, table, suffix) in shown.items():
        if (folder / FOLDER / f"{name}.{suffix}").is_file():
            heading = name.replace("_", " ").capitalize()
            parts += [
                f"## {heading}",
                f"{caption} Numbers: [{table}.csv]({link}/{TABLES}/{table}.csv).",
                f"![{heading}]({link}/{FOLDER}/{name}.{suffix})",
            ]
    clear_unfinished(page.parent, only=page.name)
    write_text(page, inert("\n\n".join(parts) + "\n"))
    return page


def _code(text: str) -> str:
    """On one line, as code that ends nowhere but at its end."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"

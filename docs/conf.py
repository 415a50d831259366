"""The site: `sphinx-build -W --keep-going -c docs . build/site` in the repository's root.

Pages are the repository's own Markdown, which has no word of Sphinx in it: the navigation and the
notebook's page are made here. `docs/api` names the modules whose docstrings are the reference.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

from moe_emergence import __version__

project = "moe_emergence"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "README"
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
include_patterns = ["*.md", "docs/**"]
myst_heading_anchors = 4
default_role = "code"
smartquotes = False  # they make a dash of the two of a flag
autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = project
pygments_style, pygments_dark_style = "friendly", "monokai"

PAGES = {
    "Tasks": ["train", "look", "use", "reproduce", "tour"],
    "Reference": [
        *("contract", "analysis", "statistics", "gallery", "verification", "transformers"),
        *("reliability", "scaling", "architecture", "kernels", "performance", "gpu", "mutations"),
    ],
    "Results": ["results", "experiments/README"],
    "API": [f"api/{path.stem}" for path in sorted(Path(__file__).parent.glob("api/*.md"))],
}
REPORTS = "docs/**/report", "docs/results/h?00/*", "docs/experiments/PREREGISTRATION"


def tree(caption: str, pages: list[str], *options: str) -> str:
    lines = [f":caption: {caption}", *options, "", *pages]
    return "\n".join(["", "```{toctree}", *lines, "```", ""])


def notebook_page(notebook: dict[str, Any]) -> str:
    """Markdown of a notebook with the outputs it holds."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                image = "".join(data["image/png"]).replace("\n", "")
                parts.append(f"![Output](data:image/png;base64,{image})")
            else:
                parts.append("```text\n" + "".join(data["text/plain"]) + "\n```")
    return "\n\n".join(parts)


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    if Path(app.env.doc2path(docname)).suffix == ".ipynb":
        source[0] = notebook_page(json.loads(source[0]))
    if docname == root_doc:
        for caption, pages in PAGES.items():
            source[0] += tree(caption, [f"docs/{page}" for page in pages], ":hidden:")
        rest = ["CONTRIBUTING", "SECURITY", "CHANGELOG"]
        source[0] += tree("Project", rest, ":hidden:")
    if docname == "docs/results":
        source[0] += tree("Reports", [f"/{page}" for page in REPORTS], ":glob:", ":hidden:")


def parse(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Args, Returns and Raises. Of a field's docstring what stands before a colon is no type."""
    if what not in ("attribute", "data"):
        lines[:] = GoogleDocstring(lines, Config(), app, what, name, obj, options).lines()


def begin_at_index(app: Sphinx, failed: Exception | None) -> None:
    if failed is None:
        shutil.copy(app.outdir / f"{root_doc}.html", app.outdir / "index.html")


def setup(app: Sphinx) -> None:
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", parse)
    app.connect("build-finished", begin_at_index)

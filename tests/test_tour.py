"""The tour's cells run in order, and its committed outputs are those of a whole run."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from matplotlib.figure import Figure
from transformers import logging

pytestmark = pytest.mark.slow

TOUR = REPOSITORY / "docs" / "tour.ipynb"
CELLS = [c for c in json.loads(TOUR.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]


def source_of(cell: dict[str, Any]) -> str:
    """Its Python: a notebook's own commands begin with %."""
    return "".join(line for line in cell["source"] if not line.startswith("%"))


def run(cell: dict[str, Any], namespace: dict[str, Any]) -> Any:
    """The value of the cell's last line, where that is an expression, as a notebook shows it."""
    tree = ast.parse(source_of(cell))
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(TOUR), "exec"), namespace)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), str(TOUR), "eval"), namespace)
    return None


def test_cells_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    verbosity = logging.get_verbosity()
    namespace: dict[str, Any] = {}
    try:
        for cell in CELLS:
            value = run(cell, namespace)
            printed = capsys.readouterr().out
            kinds = [set(output.get("data", ())) for output in cell["outputs"]]
            texts = [o["text"] for o in cell["outputs"] if o["output_type"] == "stream"]
            # figures differ with machine and version, what there is to see does not
            assert bool(printed) == bool(texts), source_of(cell)
            assert (value is not None) == any(kinds), source_of(cell)
            assert isinstance(value, Figure) == any("image/png" in kind for kind in kinds)
    finally:
        logging.set_verbosity(verbosity)


def test_outputs_are_of_one_run_and_small() -> None:
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {
        "stream",
        "execute_result",
        "display_data",
    }
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    assert TOUR.stat().st_size < 300_000

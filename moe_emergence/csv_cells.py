"""CSV whose text no spreadsheet takes for a formula.

Text that begins like one (`=`, `+`, `-`, `@`, tab, line break) gets an apostrophe in front, as
does text that begins with apostrophes before such a character, so that reading takes off exactly
what writing put there. Numbers stay as they are.
"""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")


def guarded(text: str) -> str:
    """The text as a cell."""
    return f"'{text}" if _FORMULA.match(text) else text


def unguarded(cell: str) -> str:
    """The text of a cell that `guarded` wrote."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def csv_of(table: pd.DataFrame, **options: Any) -> str:
    """The table as CSV without its index; `options` are those of `DataFrame.to_csv`."""
    cells = _mapped(table, guarded)
    # of these pandas and Python before 3.13 do not know that they end a line for readers
    text_columns = (cells.iloc[:, place] for place in _text_columns(cells))
    returns = any("\r" in cell for column in text_columns for cell in column.unique().astype(str))
    quoting = csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL
    text: str = cells.to_csv(index=False, lineterminator="\n", quoting=quoting, **options)
    return text


def read_csv(path: Path) -> pd.DataFrame:
    """What `csv_of` made."""
    return _mapped(pd.read_csv(path), unguarded)


def _mapped(table: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    def cell(value: Any) -> Any:
        return change(value) if isinstance(value, str) else value

    mapped = table.rename(columns=cell)
    for place in _text_columns(table):
        column = table.iloc[:, place].astype(object)
        changed = {value: cell(value) for value in column.unique()}
        mapped.isetitem(place, column.map(changed, na_action="ignore"))
    return mapped


def _text_columns(table: pd.DataFrame) -> list[int]:
    """Places of the columns that are no numbers."""
    numbers = pd.api.types.is_numeric_dtype
    return [place for place, dtype in enumerate(table.dtypes) if not numbers(dtype)]

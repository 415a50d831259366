"""Tidy tables in a folder, each as Parquet and CSV: complete, or not there at all."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from moe_emergence.csv_cells import csv_of
from moe_emergence.disk import clear_unfinished, remove_file, whole_file, write_text

TABLES = "tables"
FIGURES = "figures"


def write_tables(folder: Path, tables: Mapping[str, pd.DataFrame]) -> list[Path]:
    """Write `folder/tables/NAME.parquet` and `.csv` of every table that has rows.

    Tables that an earlier analysis left there and this one has not are deleted.

    Raises:
        RunError: when the disk is full or not writable, naming the path.
    """
    place = folder / TABLES
    clear_unfinished(place)
    written = []
    for name, table in tables.items():
        if len(table):
            for suffix in ("parquet", "csv"):
                written.append(place / f"{name}.{suffix}")
                _write(table, written[-1])
    for stale in set(place.glob("*.parquet")) | set(place.glob("*.csv")):
        if stale not in written:
            remove_file(stale)
    return written


def read_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """All tables of an analysis folder by name; `ValueError` where one cannot be read."""
    tables = {}
    for path in sorted((folder / TABLES).glob("*.parquet")):
        try:
            tables[path.stem] = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: no table can be read from it ({error})") from error
    return tables


def _write(table: pd.DataFrame, path: Path) -> None:
    if path.suffix == ".csv":
        write_text(path, csv_of(table, float_format="%.6g"))
    else:
        with whole_file(path) as new:
            table.to_parquet(new, index=False)

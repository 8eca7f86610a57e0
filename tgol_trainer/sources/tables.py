"""Read the beginning of text tables: separator, decimal sign, and what readers would swallow in silence."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tgol_trainer._files import NotTextError, check_text
from tgol_trainer.data.images import DataError, describe

logger = logging.getLogger(__name__)

_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+")
_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2},\d{3}")
_SAMPLE = 1_000_000
"""Characters of a CSV file that are searched for its separator, rows that are too long and decimal commas."""


def check_table(path: Path) -> None:
    """Raise a [`DataError`] for a text table that is empty or not UTF-8."""
    try:
        check_text(path)
    except NotTextError as error:
        raise DataError(f"`source`: {error}") from error
    with path.open(encoding="utf-8-sig") as file:
        if not any(map(str.strip, file)):
            raise DataError(f"`source`: {str(path)!r} is empty. Write one line for each image into it.")


def is_empty_parquet(source: Path) -> bool:
    """Return whether a file, or the files below a folder, are Parquet without a row."""
    files = [source] if source.is_file() else sorted(source.rglob("*.parquet"))
    try:
        return bool(files) and not any(pq.read_metadata(file).num_rows for file in files)
    except (OSError, pa.ArrowException):
        return False


def csv_options(paths: Sequence[Path], used: Collection[str]) -> dict[str, Any]:
    """
    Return the options of the CSV reader for files as spreadsheets write them. The first file decides.

    Args:
        paths (`Sequence[Path]`): The files.
        used (`Collection[str]`): Columns that are read, of which a file may not have two.

    Raises:
        DataError: for a row that is longer than the header, a used column that is there twice, and a file that is
            empty or not UTF-8.
    """
    for path in reversed(paths):
        check_table(path)
        separator, columns, cells = _read_sample(path)
        twice = [name for name in dict.fromkeys(columns) if columns.count(name) > 1 and name in used]
        if twice:
            raise DataError(
                f"`source`: {str(path)!r} has {columns.count(twice[0])} columns called {twice[0]!r}, and which one is "
                "meant is not known. Rename the others."
            )
    if not any(map(str.strip, cells)):
        raise DataError(f"`source`: {str(paths[0])!r} names its columns, {columns}, and has no rows.")
    commas = [cell for cell in map(str.strip, cells) if _DECIMAL_COMMA.fullmatch(cell)] if separator != "," else []
    decimal_comma = bool(commas)
    if commas and all(map(_THOUSANDS.fullmatch, commas)):
        logger.warning(
            "%s: the commas in its numbers are read as decimal signs: %s is %g. If they part thousands, remove them "
            "from the file.",
            *(paths[0], commas[0], float(commas[0].replace(",", "."))),
        )
    return {
        "sep": separator,
        "decimal": "," if decimal_comma else ".",
        # Where the first row has more values than the header (a separator at its end is enough), the reader would take
        # the first column for row names and every other column for its neighbour.
        "index_col": False,
        "skipinitialspace": True,  # `a dog, "x, y"` and a blank after the comma
        # In one piece: otherwise a word far down in a column of numbers stops the reader. The check of the rows can
        # name its row.
        "chunksize": 2**31 - 1,
    }


def _read_sample(path: Path) -> tuple[str, list[str], list[str]]:
    """Return the separator of a CSV file, the names of its columns, and the cells of its beginning."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        beginning = file.read(_SAMPLE)
    header = next((line for line in io.StringIO(beginning, newline="") if line.strip()), "")
    # Spreadsheets write ";" where the comma is the decimal sign, and a tab when asked for text.
    separator = max(",;\t", key=lambda sign: len(next(csv.reader([header], delimiter=sign), [])))
    rows = csv.reader(io.StringIO(beginning, newline=""), delimiter=separator, skipinitialspace=True)
    columns: list[str] = next(filter(None, rows), [])  # the reader of `datasets` passes over blank lines too
    cells: list[str] = []
    for row in _rows(rows, path):
        cells += row
        if any(cell.strip() for cell in row[len(columns) :]):
            sign = {",": "comma", ";": "semicolon", "\t": "tab"}[separator]
            raise DataError(
                f"`source`: line {rows.line_num} of {str(path)!r} has {len(row)} values, and the header names "
                f"{len(columns)}: {columns}. The first line must name every column, and a text that holds a {sign} "
                f'must stand in double quotation marks: "one{separator} two". The line: '
                + describe(separator.join(row), 100)
            )
    return separator, [name.strip() for name in columns], cells


def _rows(rows: Any, path: Path) -> Iterator[list[str]]:
    try:
        yield from rows
    except csv.Error as error:
        raise DataError(
            f"`source`: {str(path)!r} cannot be read beyond line {rows.line_num}: {error}. Shorten the text, or close "
            "the quotation mark in front of it."
        ) from error

"""CSV files: what a cell means is a matter of its column, never of how the cell looks."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.records import read_text

_JSON = frozenset({"images", "ranking", "scores", "captions", "metadata"})
"""Canonical columns whose cells are lists or mappings."""
_TEXT = frozenset({"id", "prompt", "caption", "text", "image", "file_name", "chosen", "rejected", "mismatched"})
_NUMBERED_TEXT = re.compile(r"(image|caption|jpg)_\d+")
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_TRUTH = {"true": True, "false": False}


def read_csv(path: Path, column_map: Mapping[str, str]) -> tuple[list[dict[str, Any]], list[int]]:
    """Read a CSV file with a header; empty cells are missing values, empty lines are passed over.

    Captions, paths and ids stay text. ``winner`` and ``label`` are numbers (``label`` also true or false), ``images``,
    ``ranking``, ``scores``, ``captions`` and ``metadata`` are JSON. A column of another name holds numbers where all
    of its cells do, else text.

    Args:
        path: the file.
        column_map: canonical column -> column of the file.

    Returns:
        the rows, and the number of the line that each begins in.

    Raises:
        UserError: naming file and line, for a row with more or fewer cells than the header, or a cell that is not JSON.
    """
    lines = _lines(path)
    if not lines:
        return [], []
    (_, header), *rows = lines
    roles = {own: canonical for canonical, own in column_map.items()}
    for number, cells in rows:
        if len(cells) != len(header):
            raise UserError(
                f"{path}, line {number}: {len(cells)} cells where the header names {len(header)} columns; text that "
                "holds a comma goes between double quotes"
            )
    converters = [
        _converter(roles.get(name, name), [cells[column] for _, cells in rows]) for column, name in enumerate(header)
    ]
    found = []
    for number, cells in rows:
        named = zip(header, converters, cells, strict=True)
        try:
            found.append({name: convert(cell) if cell else None for name, convert, cell in named})
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: {error.doc!r} is not valid JSON: {error}") from None
    return found, [number for number, _ in rows]


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """Return the cells of each record with the line it begins in: cells between quotes may hold line feeds."""
    reader = csv.reader(io.StringIO(read_text(path)))
    found, begins = [], 1
    try:
        for cells in reader:
            if cells:
                found.append((begins, cells))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {begins}: not valid CSV: {error}") from None
    return found


def _converter(role: str, cells: Sequence[str]) -> Callable[[str], Any]:
    if role in _JSON:
        return json.loads
    if role == "label":
        return lambda cell: _TRUTH.get(cell.strip().lower(), _number(cell))
    if role == "winner":
        return _number
    if role in _TEXT or _NUMBERED_TEXT.fullmatch(role):
        return str
    return _number if all(_NUMBER.fullmatch(cell.strip()) for cell in cells if cell) else str


def _number(cell: str) -> int | float | str:
    """Return a number, whole ones as such ("1.0" too: tables with gaps hold those); other text as it is."""
    if not _NUMBER.fullmatch(cell.strip()):
        return cell
    value = float(cell)
    return int(value) if value.is_integer() else value

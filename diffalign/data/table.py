"""Tables: rows by canonical column, whatever they were read from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.data.image_source import ImageSource
from diffalign.data.layouts import Layout
from diffalign.data.rows import record_from_row
from diffalign.data.schema import HeldOut, Record
from diffalign.errors import UserError


@dataclass(frozen=True)
class Table:
    """Rows of a data set with canonical columns; images are handles, not pixels.

    Args:
        name: of the source, for messages.
        columns: columns as the source names them.
        rows: starts a pass over the rows, each under the source's own columns.
        root: folder of relative image paths.
        streams: rows come from a stream and can be many; nothing may gather them.
        held_out: held-out captions and their judges, where the source has them.
        notes: reason -> number of things the reader left out.
        lines: number of the line each row begins in, where the source is a file of lines.
    """

    name: str
    columns: frozenset[str]
    rows: Callable[[], Iterator[Mapping[str, Any]]]
    root: Path | None = None
    streams: bool = False
    held_out: Callable[[str, int, int], HeldOut] | None = None
    notes: Mapping[str, int] = field(default_factory=dict)
    lines: Sequence[int] | None = None

    def where(self, index: int) -> str:
        """Name a row, counted from 0, in messages: by the line it begins in where there are lines."""
        place = counted(index) if self.lines is None else f"line {self.lines[index]}"
        return f"{self.name}, {place}"


def counted(index: int) -> str:
    """Name a row that no editor numbers."""
    return f"row {index} (counted from 0)"


@dataclass(frozen=True)
class RowReader:
    """Turns the rows of a table into records.

    Args:
        table: the table.
        rename: brings a row to canonical columns (column map and aliases).
        layout: the published layout, where the columns are those of one.
    """

    table: Table
    rename: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    layout: Layout | None = None

    def __iter__(self) -> Iterator[Record]:
        """Yield records.

        Raises:
            UserError: naming the first bad row and what is wrong with it.
        """
        for index, row in enumerate(self.table.rows()):
            yield self.read(index, row)

    def read(self, index: int, row: Mapping[str, Any]) -> Record:
        """Read one row, counted from 0.

        Raises:
            UserError: naming the row and what is wrong with it.
        """
        where = self.table.where(index)
        if self.layout is not None:
            try:
                row = {"id": row.get("id"), **self.layout.convert(row)}
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            row = self._with_folders(row)
        else:
            row = self.rename(row)
        return record_from_row(row, f"row-{index}", where, self.table.root)

    def _with_folders(self, row: dict[str, Any]) -> dict[str, Any]:
        """Find image files where the published data set keeps them: beside the annotations or in a folder of theirs."""
        root = self.table.root
        if root is None or self.layout is None or "images" not in row:
            return row
        folders = [root, *(root / name for name in self.layout.image_folders)]
        images = []
        for image in row["images"] or []:
            if isinstance(image, str):
                found = next((folder / image for folder in folders if (folder / image).is_file()), root / image)
                image = ImageSource.from_path(found, image)
            images.append(image)
        return {**row, "images": images}

"""Look a data set over before training on it: every row and every image, the first fault of each kind named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from diffalign.data.image_source import ImageSource, UnreadableImage
from diffalign.data.load import examples_from_records
from diffalign.data.readers import SourceOptions, open_records
from diffalign.data.schema import SKIPPED, Record, describe_notes, kind_info
from diffalign.data.table import RowReader
from diffalign.errors import UserError
from diffalign.strategies.base import DataKind


@dataclass(frozen=True)
class CheckReport:
    """What a check found.

    Args:
        source: name of the data set.
        kind: the kind it was checked for.
        layout: the published layout its columns were recognised as; empty for canonical columns.
        rows: rows read.
        examples: examples they make, those with unreadable images not counted.
        bad_rows: rows that break a rule; training refuses the data set while there are any.
        first_bad_row: which row, and why; empty where there is none.
        unreadable: images that do not decode; training skips them, counted, unless it is told to be strict.
        first_unreadable: which image, and why.
        image_sizes: (height, width) -> number of images.
        notes: reason -> number of rows or images left out for this kind.
    """

    source: str
    kind: DataKind
    layout: str
    rows: int
    examples: int
    bad_rows: int = 0
    first_bad_row: str = ""
    unreadable: int = 0
    first_unreadable: str = ""
    image_sizes: Mapping[tuple[int, int], int] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether training would accept the data set, unreadable images not counting."""
        return not self.bad_rows and self.examples > 0

    def lines(self) -> list[str]:
        """Return the report as lines of text, the verdict first."""
        layout = f" ({self.layout} layout)" if self.layout else ""
        verdict = "usable" if self.ok else "not usable"
        lines = [f"{self.source}{layout}: {verdict} as {self.kind.replace('_', ' ')}"]
        whole = self.notes or not (self.bad_rows or self.unreadable)
        counts = [f"rows: {self.rows}", f"examples: {self.examples}", *([describe_notes(self.notes)] if whole else [])]
        lines.append("; ".join(counts))
        if self.image_sizes:
            sizes = sorted(self.image_sizes.items(), key=lambda item: (-item[1], item[0]))
            shown = ", ".join(f"{height}x{width} ({count})" for (height, width), count in sizes[:5])
            more = f" and {len(sizes) - 5} other sizes" if len(sizes) > 5 else ""
            lines.append(f"images (height x width): {shown}{more}")
        if self.bad_rows:
            lines.append(f"bad rows: {self.bad_rows}; the first: {self.first_bad_row}")
        if self.unreadable:
            lines.append(f"unreadable images: {self.unreadable}; the first: {self.first_unreadable}")
        return lines


def check_dataset(source: Any, kind: DataKind, options: SourceOptions | None = None) -> CheckReport:
    """Read every row and decode every image, without stopping at the first fault.

    Args:
        source: as for :func:`diffalign.data.load.load_examples`.
        kind: the kind of examples it should serve as.
        options: split, columns, pairing.

    Raises:
        UserError: if the source cannot be opened, or lacks a column: then there are no rows to look at.
    """
    kind_info(kind)
    options = options or SourceOptions()
    reader = open_records(source, kind, options)
    records: list[Record] = []
    sizes: Counter[tuple[int, int]] = Counter()
    unreadable: dict[str, str] = {}
    seen: set[str] = set()
    bad, first_bad, rows = 0, "", 0
    for index, row in enumerate(reader.table.rows()):
        rows += 1
        try:
            record = _checked(reader, index, row, kind, options)
        except UserError as error:
            bad, first_bad = bad + 1, first_bad or str(error)
            continue
        for image in record.images:
            if image.name not in seen:
                seen.add(image.name)
                _look_at(image, sizes, unreadable)
        records.append(record)
    examples, notes = examples_from_records(records, kind, options.pairing, options.seed) if records else ([], {})
    usable = sum(not any(image.name in unreadable for image in example.images) for example in examples)
    notes = {**reader.table.notes, **notes}
    if usable < len(examples):
        notes[SKIPPED] = len(examples) - usable
    return CheckReport(
        source=reader.table.name,
        kind=kind,
        layout=reader.layout.name if reader.layout else "",
        rows=rows,
        examples=usable,
        bad_rows=bad,
        first_bad_row=first_bad,
        unreadable=len(unreadable),
        first_unreadable=next(iter(unreadable.values()), ""),
        image_sizes=sizes,
        notes=notes,
    )


def _checked(reader: RowReader, index: int, row: Mapping[str, Any], kind: DataKind, options: SourceOptions) -> Record:
    """Read a row and see whether it makes examples.

    Raises:
        UserError: naming the row and what is wrong with it.
    """
    record = reader.read(index, row)
    try:
        examples_from_records([_with_some_mismatch(record)], kind, options.pairing)
    except UserError as error:
        raise UserError(f"{reader.table.where(index)}: {error}") from None
    return record


def _with_some_mismatch(record: Record) -> Record:
    """Mismatched captions are made from all rows together; one row alone only shows whether the rest of it is right."""
    return record if record.mismatched else replace(record, mismatched=(f"not {record.prompt}",))


def _look_at(image: ImageSource, sizes: Counter[tuple[int, int]], unreadable: dict[str, str]) -> None:
    try:
        decoded = image.decode()
    except UnreadableImage as error:
        unreadable[image.name] = str(error)
    else:
        sizes[decoded.height, decoded.width] += 1

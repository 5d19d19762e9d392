"""From what a user names to a table: the bundled world, a file, a folder, a hub name, or an object in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from diffalign.data.bundled import read_bundled
from diffalign.data.file_tables import (
    ANNOTATION_SUFFIXES,
    METADATA_NAMES,
    has_label_folders,
    read_annotations,
    read_captions,
    read_image_folder,
    read_label_folders,
    refuse_lone_label_folder,
)
from diffalign.data.hf_tables import IMAGE_SUFFIXES, load_hf, load_saved, load_webdataset, table_of_dataset
from diffalign.data.layouts import recognise
from diffalign.data.pairing import PairingOptions
from diffalign.data.rendered import read_rendered
from diffalign.data.rows import apply_column_map, require_columns
from diffalign.data.table import RowReader, Table, counted
from diffalign.errors import UserError, unknown
from diffalign.strategies.base import DataKind

BUNDLED = "bundled"
RENDERED = "rendered"
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class SourceOptions:
    """Where data come from and how their rows are read.

    Args:
        split: split to use where the source has several.
        config: configuration of a hub data set.
        data_format: how the source is laid out, one of :data:`FORMATS`; "auto" looks at it.
        column_map: canonical column -> column of the source.
        default_prompt: caption of pictures in folders that have no text file beside them.
        streaming: read as a stream.
        max_samples: use only so many examples; 0 for all.
        pairing: how several images of a caption become pairs.
        seed: decides which captions mismatched ones are made from.
    """

    split: str = "train"
    config: str | None = None
    data_format: str = "auto"
    column_map: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    streaming: bool = False
    max_samples: int = 0
    pairing: PairingOptions = field(default_factory=PairingOptions)
    seed: int = 0


def open_table(source: Any, kind: DataKind, options: SourceOptions) -> Table:
    """Open a source.

    Args:
        source: "bundled", "rendered", a path, a hub name, a ``datasets`` object, or a list of rows; of captions where
            no more is wanted.
        kind: what examples are wanted; the bundled data keep pairs and lists in files of their own.
        options: split, format, streaming.

    Raises:
        UserError: if there is no such source, or it does not look like the format named.
    """
    if not isinstance(source, str | Path):
        if isinstance(source, Sequence):
            rows = [_row(index, row, kind) for index, row in enumerate(source)]
            return Table("rows", frozenset(column for row in rows for column in row), lambda: iter(rows))
        return table_of_dataset(source, type(source).__name__)
    name = options.data_format
    if name == "auto":
        name = detect_format(source)
    if name not in FORMATS:
        raise unknown("data format", name, [*FORMATS, "auto"])
    return FORMATS[name](source, kind, options)


def _row(index: int, row: Any, kind: DataKind) -> Mapping[str, Any]:
    if isinstance(row, Mapping):
        return row
    if isinstance(row, str) and kind == "prompts":
        return {"prompt": row}
    raise UserError(
        f"rows, {counted(index)} is a value of type {type(row).__name__}; expected a mapping of column to value, "
        "such as {'prompt': 'a red circle', ...}"
    )


def open_records(source: Any, kind: DataKind, options: SourceOptions) -> RowReader:
    """Open a source and check that its columns suffice for the kind.

    Raises:
        UserError: see :func:`open_table`; also if a column is missing.
    """
    table = open_table(source, kind, options)
    layout = None if options.column_map else recognise(table.columns)
    if layout is None:
        require_columns(table.columns, options.column_map, kind, table.name)
    return RowReader(table, partial(apply_column_map, column_map=options.column_map), layout)


def detect_format(source: str | Path) -> str:
    """Say how a source is laid out, from its name and, for folders, what lies in it.

    Raises:
        UserError: if a path exists but holds nothing known, or looks like a path and does not exist.
    """
    if str(source) in (BUNDLED, RENDERED):
        return str(source)
    path = Path(source)
    if path.is_dir():
        return _detect_folder(path)
    if path.is_file():
        return _detect_file(path)
    if path.is_absolute() or path.suffix or str(source).startswith((".", "~")) or str(source).count("/") != 1:
        raise UserError(
            f"there is no data set at {str(source)!r}: give {BUNDLED!r}, {RENDERED!r}, an existing file or folder, "
            "or a hub name (OWNER/NAME)"
        )
    return "hub"


def _detect_file(path: Path) -> str:
    if path.name.endswith(_TAR_SUFFIXES):
        return "webdataset"
    if path.suffix == ".parquet":
        return "parquet"
    if path.suffix in ANNOTATION_SUFFIXES:
        return "annotations"
    if path.suffix == ".txt":
        return "captions"
    known = ", ".join([".parquet", *sorted(ANNOTATION_SUFFIXES), ".txt", ".tar"])
    raise UserError(f"{path} has an unknown suffix {path.suffix!r}; known: {known}")


def _detect_folder(folder: Path) -> str:
    names = {path.name for path in folder.iterdir()}
    if names & {"state.json", "dataset_dict.json"}:
        return "disk"
    if {"images.parquet", "pairs.parquet", "lists.parquet"} <= names:
        return "bundled"
    if has_label_folders(folder):
        return "liked_disliked"
    if names & set(METADATA_NAMES):
        return "image_folder"
    if any(folder.rglob("*.parquet")):
        return "parquet"
    if _tar_files(folder):
        return "webdataset"
    annotations = _annotation_files(folder)
    if annotations:
        return "annotations"
    if any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.rglob("*")):
        return "image_folder"
    raise UserError(
        f"{folder} holds no data: expected images, metadata.jsonl, a .jsonl, .json or .csv file, .parquet or .tar "
        "files, or the folders 'liked' and 'disliked'"
    )


def _tar_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.iterdir() if file.name.endswith(_TAR_SUFFIXES))


def _annotation_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.iterdir() if file.suffix in ANNOTATION_SUFFIXES)


def _open_bundled(source: str | Path, kind: DataKind, options: SourceOptions) -> Table:
    from diffalign.bundled import bundled_path

    folder = bundled_path("preferences") if str(source) == BUNDLED else Path(source)
    return read_bundled(folder, kind, options.column_map.values())


def _open_rendered(source: str | Path, kind: DataKind, options: SourceOptions) -> Table:
    return read_rendered()


def _open_hub(source: str | Path, kind: DataKind, options: SourceOptions) -> Table:
    return load_hf(str(source), str(source), options.split, options.streaming, name=options.config)


def _open_parquet(source: str | Path, kind: DataKind, options: SourceOptions) -> Table:
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    of_split = [file for file in files if file.name.startswith(options.split)] or files
    return load_hf("parquet", path.name, "train", options.streaming, data_files=[str(file) for file in of_split])


def _open_annotations(source: str | Path, kind: DataKind, options: SourceOptions) -> Table:
    path = Path(source)
    files = _annotation_files(path)
    chosen = [file for file in files if file.stem == options.split] or files
    if len(chosen) != 1:
        raise UserError(
            f"{path} holds {', '.join(file.name for file in files)}: name one of them, or choose with --train_split"
        )
    return read_annotations(chosen[0], options.column_map)


def _open_captions(source: str | Path, kind: DataKind, options: SourceOptions) -> Table:
    return read_captions(Path(source))


def _open_webdataset(source: str | Path, kind: DataKind, options: SourceOptions) -> Table:
    return load_webdataset(_tar_files(Path(source)), Path(source).name, options.streaming)


def _open_disk(source: str | Path, kind: DataKind, options: SourceOptions) -> Table:
    return load_saved(Path(source), options.split)


def _open_image_folder(source: str | Path, kind: DataKind, options: SourceOptions) -> Table:
    folder = Path(source)
    if not any((folder / name).is_file() for name in METADATA_NAMES):
        refuse_lone_label_folder(folder, kind)
    return read_image_folder(folder, options.default_prompt, options.column_map)


def _open_label_folders(source: str | Path, kind: DataKind, options: SourceOptions) -> Table:
    return read_label_folders(Path(source), options.default_prompt)


FORMATS: Mapping[str, Callable[[str | Path, DataKind, SourceOptions], Table]] = {
    "bundled": _open_bundled,
    "rendered": _open_rendered,
    "hub": _open_hub,
    "parquet": _open_parquet,
    "annotations": _open_annotations,
    "captions": _open_captions,
    "webdataset": _open_webdataset,
    "disk": _open_disk,
    "image_folder": _open_image_folder,
    "liked_disliked": _open_label_folders,
}
"""Formats by name, as ``--data_format`` takes them."""

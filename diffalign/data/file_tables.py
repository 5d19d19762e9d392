"""Tables over plain files: jsonl, json, csv, captions, a folder of images, the folders ``liked`` and ``disliked``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign.data.csv_tables import read_csv
from diffalign.data.hf_tables import IMAGE_SUFFIXES
from diffalign.data.image_source import ImageSource
from diffalign.data.rows import COMPARING
from diffalign.data.table import Table, counted
from diffalign.errors import UserError
from diffalign.records import read_lines, read_text
from diffalign.strategies.base import DataKind

LABEL_FOLDERS: Mapping[str, float] = {"liked": 1.0, "disliked": 0.0}
METADATA_NAMES = ("metadata.jsonl", "metadata.json", "metadata.csv")
"""Files that describe the images of a folder, as the ``imagefolder`` builder of ``datasets`` names them."""
_Parsed = tuple[list[dict[str, Any]], list[int] | None]
"""Rows, and the number of the line each begins in where lines are what a file is made of."""


def read_annotations(path: Path, column_map: Mapping[str, str] | None = None) -> Table:
    """Read a jsonl, json or csv file; relative image paths start at its folder.

    Args:
        path: the file.
        column_map: canonical column -> column of the file; tells what the cells of a CSV file mean.

    Raises:
        UserError: naming the line that is not valid or not UTF-8, or if the file is empty.
    """
    rows, lines = _PARSERS[path.suffix.lower()](path, column_map or {})
    if not rows:
        raise UserError(f"{path} is empty: it holds no row")
    columns = frozenset(column for row in rows for column in row)
    return Table(path.name, columns, lambda: iter(rows), root=path.parent, lines=lines)


def read_captions(path: Path) -> Table:
    """Read a text file with one caption a line; empty lines are passed over.

    Raises:
        UserError: if there is no caption, or naming the line that is not UTF-8.
    """
    captions = {number: text for number, line in enumerate(read_lines(path), start=1) if (text := line.strip())}
    rows = [{"prompt": text} for text in captions.values()]
    if not rows:
        raise UserError(f"{path} is empty: it holds no caption")
    return Table(path.name, frozenset({"prompt"}), lambda: iter(rows), lines=list(captions))


def read_image_folder(
    folder: Path, default_prompt: str | None = None, column_map: Mapping[str, str] | None = None
) -> Table:
    """Read the images of a folder and of those below it.

    With ``metadata.jsonl`` (or ``.csv``) its rows are the data: ``file_name`` names the image of a row, or ``images``
    several. Without, each image is a row and its caption stands in the text file of the same name beside it.

    Args:
        folder: the folder.
        default_prompt: caption of images without a text file.
        column_map: see :func:`read_annotations`.

    Raises:
        UserError: if there is no image, or an image has no caption.
    """
    described = next((folder / name for name in METADATA_NAMES if (folder / name).is_file()), None)
    if described is not None:
        table = read_annotations(described, column_map)
        rename = {"file_name": "image"}
        rows = [{rename.get(name, name): value for name, value in row.items()} for row in table.rows()]
        columns = frozenset(column for row in rows for column in row)
        return replace(table, name=f"{folder.name}/{described.name}", columns=columns, rows=lambda: iter(rows))
    rows = [_image_row(path, folder, default_prompt) for path in _images_below(folder)]
    if not rows:
        raise UserError(f"{folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return Table(folder.name, frozenset(rows[0]), lambda: iter(rows), root=folder)


def has_label_folders(folder: Path) -> bool:
    """Whether a folder is laid out as ``liked`` and ``disliked``."""
    return all((folder / name).is_dir() for name in LABEL_FOLDERS)


def refuse_lone_label_folder(folder: Path, kind: DataKind) -> None:
    """Say what is missing beside ``liked`` or ``disliked`` alone, where the kind needs it.

    Raises:
        UserError: for a kind that compares images, or that would take disliked ones for good.
    """
    alone = [name for name in LABEL_FOLDERS if (folder / name).is_dir()]
    if alone == ["liked"] and kind in COMPARING:
        raise UserError(
            f"{folder} holds 'liked' but no folder 'disliked' beside it, and {kind.replace('_', ' ')} need both: add "
            "it, or choose a method that learns from good pictures alone, such as sft (kind winners)"
        )
    if alone == ["disliked"] and kind != "prompts":
        raise UserError(
            f"{folder} holds 'disliked' but no folder 'liked' beside it: no method learns from disliked pictures alone"
        )


def read_label_folders(folder: Path, default_prompt: str | None = None) -> Table:
    """Read the pictures somebody has sorted into ``liked`` and ``disliked``.

    Captions stand in text files beside the pictures (``photo.png``, ``photo.txt``), or one caption serves all.

    Raises:
        UserError: if a folder is missing, both are empty, or a picture has no caption.
    """
    if not has_label_folders(folder):
        raise UserError(f"{folder} must hold the folders 'liked' and 'disliked', both")
    rows: list[dict[str, Any]] = []
    for name, label in LABEL_FOLDERS.items():
        rows += [{**_image_row(path, folder, default_prompt), "label": label} for path in _images_below(folder / name)]
    if not rows:
        raise UserError(f"{folder}: neither liked nor disliked holds an image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return Table(folder.name, frozenset(rows[0]), lambda: iter(rows), root=folder)


def _images_below(folder: Path) -> Iterator[Path]:
    # Sorted: the order of a directory listing differs between machines, and ids and batches must not.
    return (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _image_row(path: Path, folder: Path, default_prompt: str | None) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    text = path.with_suffix(".txt")
    if text.is_file():
        prompt = read_text(text).strip()
    elif default_prompt is not None:
        prompt = default_prompt
    else:
        raise UserError(
            f"{name} in {folder} has no caption: write one into {text.name} beside it, or give one caption for all "
            "pictures with --default_prompt"
        )
    return {"id": name, "prompt": prompt, "image": ImageSource.from_path(path, name)}


def _read_jsonl(path: Path, column_map: Mapping[str, str]) -> _Parsed:
    lines = {number: line for number, line in enumerate(read_lines(path), start=1) if line.strip()}
    places = {number: f"{path}, line {number}" for number in lines}
    return [_mapping(_parse_json(line, places[n]), places[n]) for n, line in lines.items()], list(lines)


def _read_json(path: Path, column_map: Mapping[str, str]) -> _Parsed:
    text = read_text(path)
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        # Many files called .json hold one object a line.
        return _read_jsonl(path, column_map)
    if not isinstance(values, list):
        raise UserError(f"{path} holds a {type(values).__name__}; expected a list of rows")
    return [_mapping(value, f"{path}, {counted(index)}") for index, value in enumerate(values)], None


_PARSERS: Mapping[str, Callable[[Path, Mapping[str, str]], _Parsed]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": read_csv,
}
ANNOTATION_SUFFIXES = frozenset(_PARSERS)


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} holds a {type(value).__name__}; expected an object with columns")
    return value

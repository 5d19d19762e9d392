"""Tables over plain files: jsonl, json, csv, captions, a folder of images, the folders ``liked`` and ``disliked``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffalign.data.hf_tables import IMAGE_SUFFIXES
from diffalign.data.image_source import ImageSource
from diffalign.data.table import Table
from diffalign.errors import UserError
from diffalign.records import read_lines, read_text

LABEL_FOLDERS: Mapping[str, float] = {"liked": 1.0, "disliked": 0.0}
METADATA_NAMES = ("metadata.jsonl", "metadata.json", "metadata.csv")
"""Files that describe the images of a folder, as the ``imagefolder`` builder of ``datasets`` names them."""
_CSV_JSON_COLUMNS = frozenset({"images", "ranking", "scores", "captions", "metadata"})


def read_annotations(path: Path) -> Table:
    """Read a jsonl, json or csv file; relative image paths start at its folder.

    Raises:
        UserError: naming the line that is not valid or not UTF-8, or if the file is empty.
    """
    rows = _PARSERS[path.suffix.lower()](path)
    if not rows:
        raise UserError(f"{path} is empty: it holds no row")
    columns = frozenset(column for row in rows for column in row)
    return Table(path.name, columns, lambda: iter(rows), root=path.parent)


def read_captions(path: Path) -> Table:
    """Read a text file with one caption a line; empty lines are passed over.

    Raises:
        UserError: if there is no caption, or naming the line that is not UTF-8.
    """
    lines = [line.strip() for line in read_lines(path)]
    rows = [{"prompt": line} for line in lines if line]
    if not rows:
        raise UserError(f"{path} is empty: it holds no caption")
    return Table(path.name, frozenset({"prompt"}), lambda: iter(rows))


def read_image_folder(folder: Path, default_prompt: str | None = None) -> Table:
    """Read the images of a folder and of those below it.

    With ``metadata.jsonl`` (or ``.csv``) its rows are the data: ``file_name`` names the image of a row, or ``images``
    several. Without, each image is a row and its caption stands in the text file of the same name beside it.

    Args:
        folder: the folder.
        default_prompt: caption of images without a text file.

    Raises:
        UserError: if there is no image, or an image has no caption.
    """
    described = next((folder / name for name in METADATA_NAMES if (folder / name).is_file()), None)
    if described is not None:
        table = read_annotations(described)
        rename = {"file_name": "image"}
        rows = [{rename.get(name, name): value for name, value in row.items()} for row in table.rows()]
        columns = frozenset(column for row in rows for column in row)
        return Table(f"{folder.name}/{described.name}", columns, lambda: iter(rows), root=folder)
    rows = [_image_row(path, folder, default_prompt) for path in _images_below(folder)]
    if not rows:
        raise UserError(f"{folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return Table(folder.name, frozenset(rows[0]), lambda: iter(rows), root=folder)


def has_label_folders(folder: Path) -> bool:
    """Whether a folder is laid out as ``liked`` and ``disliked``."""
    return all((folder / name).is_dir() for name in LABEL_FOLDERS)


def read_label_folders(folder: Path, default_prompt: str | None = None) -> Table:
    """Read the pictures somebody has sorted into ``liked`` and ``disliked``.

    Captions stand in text files beside the pictures (``photo.png``, ``photo.txt``), or one caption serves all.

    Raises:
        UserError: if a folder is missing, both are empty, or a picture has no caption.
    """
    if not has_label_folders(folder):
        raise UserError(f"{folder} must hold the folders 'liked' and 'disliked'")
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


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            rows.append(_mapping(_parse_json(line, f"{path}, line {number}"), f"{path}, line {number}"))
    return rows


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = read_text(path)
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        # Many files called .json hold one object a line.
        return _read_jsonl(path)
    if not isinstance(values, list):
        raise UserError(f"{path} holds a {type(values).__name__}; expected a list of rows")
    return [_mapping(value, f"{path}, row {index}") for index, value in enumerate(values)]


def _read_csv(path: Path) -> list[dict[str, Any]]:
    rows = csv.DictReader(io.StringIO(read_text(path)))
    return [{name: _csv_value(name, text) for name, text in row.items()} for row in rows]


_PARSERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
ANNOTATION_SUFFIXES = frozenset(_PARSERS)


def _csv_value(column: str, text: str | None) -> Any:
    """Read a number as a number and a list as a list; empty cells are missing values."""
    if not text:
        return None
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return _parse_json(text, f"column {column}") if column in _CSV_JSON_COLUMNS else text


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} holds a {type(value).__name__}; expected an object with columns")
    return value

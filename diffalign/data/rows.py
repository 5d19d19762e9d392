"""From a row with canonical columns to a :class:`Record`, with every check that one row allows.

Columns (``docs/data.md``): ``prompt``; the images as ``images`` (a list), ``image``, ``image_0``/``image_1``/..., or
``chosen`` and ``rejected``; what is known of them as ``winner``, ``ranking``, ``scores`` or ``label``; optionally
``id``, ``captions``, ``mismatched``, ``metadata``. Every other column that holds a number, or one number an image,
becomes a field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.data.image_source import ImageSource
from diffalign.data.schema import KINDS, Numbers, Record
from diffalign.errors import UserError, nearest
from diffalign.strategies.base import DataKind

ALIASES: Mapping[str, tuple[str, ...]] = {"prompt": ("caption", "text")}
"""Other names under which a column is found where the canonical one is missing."""
CANONICAL = frozenset({
    "id", "prompt", "images", "image", "chosen", "rejected", "winner", "ranking", "scores", "label", "captions",
    "mismatched", "metadata",
})  # fmt: skip
_PREFERENCES = ("winner", "ranking", "scores", "label")
COMPARING: frozenset[DataKind] = frozenset({"pairs", "caption_pairs", "unpaired", "ranked_lists"})
"""Kinds that need to be told which images are better."""


def apply_column_map(row: Mapping[str, Any], column_map: Mapping[str, str]) -> dict[str, Any]:
    """Rename columns: ``column_map`` goes from the canonical name to the source's own."""
    own = set(column_map.values())
    renamed = {name: value for name, value in row.items() if name not in own}
    renamed.update({name: row[source] for name, source in column_map.items() if source in row})
    for name, others in ALIASES.items():
        found = [other for other in others if other in renamed]
        if name not in renamed and len(found) == 1:
            renamed[name] = renamed.pop(found[0])
    return renamed


def require_columns(columns: Collection[str], column_map: Mapping[str, str], kind: DataKind, source: str) -> None:
    """Check that a table has what a kind needs, before any row is read.

    Raises:
        UserError: saying which column is missing, which exist, and how to map one.
    """
    for name, own in column_map.items():
        if own not in columns:
            raise UserError(
                f"--column_map {name}={own}: {source} has no column {own!r} - {nearest(own, columns)}; "
                f"it has: {_listed(columns)}"
            )
    present = set(apply_column_map(dict.fromkeys(columns), column_map))
    needed = ["prompt"] if kind == "prompts" else ["prompt", "images"]
    if kind in COMPARING:
        needed.append("winner")
    for name in needed:
        if not _offers(present, name):
            raise UserError(
                f"{source} has no column {name!r}, which {kind.replace('_', ' ')} need ({KINDS[kind].columns}); "
                f"it has: {_listed(columns)}. Name the column that holds it with "
                f'--column_map \'{{"{name}": "COLUMN"}}\''
            )


def record_from_row(row: Mapping[str, Any], identity: str, where: str, root: Path | None = None) -> Record:
    """Build a record.

    Args:
        row: canonical columns; others that hold numbers become fields.
        identity: the record's id where the row has none.
        where: names the row in messages, for example ``pairs.jsonl, row 3``.
        root: folder of relative image paths.

    Raises:
        UserError: naming the row, the column, what is there and what was expected.
    """
    try:
        images, winner = _images(row, where, root)
        count = len(images)
        winner, tie = _winner(row, count) if winner is None else (winner, False)
        return Record(
            id=str(row["id"]) if row.get("id") is not None else identity,
            prompt=_caption(row.get("prompt"), "prompt"),
            images=images,
            winner=winner,
            tie=tie,
            ranking=_ranking(row.get("ranking"), count),
            scores=_scores(row.get("scores"), count),
            label=_label(row.get("label")),
            captions=_captions(row.get("captions"), count),
            mismatched=_mismatched(row.get("mismatched")),
            fields=_fields(row, count),
            metadata=_metadata(row.get("metadata")),
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _images(row: Mapping[str, Any], where: str, root: Path | None) -> tuple[tuple[ImageSource, ...], int | None]:
    """Return the images of a row and, where the columns themselves say it, the index of the preferred one."""
    winner = None
    if "chosen" in row and "rejected" in row:
        named, winner = {"chosen": row["chosen"], "rejected": row["rejected"]}, 0
    elif "images" in row:
        values = row["images"]
        if not isinstance(values, Sequence) or isinstance(values, str | bytes):
            raise UserError(f"images is a value of type {type(values).__name__}; expected a list of images")
        named = {f"images[{index}]": value for index, value in enumerate(values)}
    elif "image" in row:
        named = {"image": row["image"]}
    else:
        named = {name: row[name] for name in _numbered(row)}
    images = tuple(ImageSource.from_value(value, f"{where}, {name}", root) for name, value in named.items())
    return images, winner


def _numbered(columns: Collection[str]) -> list[str]:
    names: list[str] = []
    while f"image_{len(names)}" in columns:
        names.append(f"image_{len(names)}")
    return names


def _winner(row: Mapping[str, Any], count: int) -> tuple[int | None, bool]:
    """Return the winner's index and whether the row says that there is none."""
    value = row.get("winner")
    if "winner" in row and value in (None, "tie"):
        # A null beside scores or a ranking only means that these decide.
        return None, all(row.get(other) is None for other in ("ranking", "scores"))
    if value is None:
        return None, False
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise UserError(f'winner is {value!r}; expected the index of one of {count} images, or null or "tie" for a tie')
    return value, False


def _ranking(value: Any, count: int) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str) or sorted(value) != list(range(count)):
        raise UserError(f"ranking is {value!r}; expected the indices 0 to {count - 1} of the images, best first")
    return tuple(value)


def _scores(value: Any, count: int) -> tuple[float, ...] | tuple[tuple[float, ...], ...] | None:
    if value is None:
        return None
    expected = f"expected {count} finite numbers, one an image (or one list of rewards an image)"
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
        raise UserError(f"scores is {value!r}; {expected}")
    if value and all(isinstance(entry, Sequence) and not isinstance(entry, str) for entry in value):
        if len({len(entry) for entry in value}) != 1 or not all(_is_number(x) for entry in value for x in entry):
            raise UserError(f"scores is {value!r}; {expected}")
        return tuple(tuple(float(x) for x in entry) for entry in value)
    if not all(_is_number(entry) for entry in value):
        raise UserError(f"scores is {value!r}; {expected}")
    return tuple(float(entry) for entry in value)


def _label(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str) or value not in (0, 1, 0.5):
        raise UserError(
            f"label is {value!r} of type {type(value).__name__}; expected 1 or true (liked), 0 or false (disliked), "
            "0.5 for a tie"
        )
    return float(value)


def _caption(value: Any, name: str) -> str:
    if not isinstance(value, str):
        found = "missing" if value is None else f"a value of type {type(value).__name__}"
        raise UserError(f"{name} is {found}; expected text")
    if not value.strip():
        raise UserError(f"{name} is empty ({value!r}): every row needs a caption; caption dropout is --caption_dropout")
    return value


def _captions(value: Any, count: int) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
        raise UserError(f"captions is {value!r}; expected a list of {count} captions, one an image")
    return tuple(_caption(caption, f"captions[{index}]") for index, caption in enumerate(value))


def _mismatched(value: Any) -> tuple[str, ...]:
    """Accept a caption, or a list of captions or of ``{"text", "kind"}``."""
    if value is None:
        return ()
    listed = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return tuple(_caption(v.get("text") if isinstance(v, Mapping) else v, "mismatched") for v in listed)


def _metadata(value: Any) -> Mapping[str, Any]:
    """Accept a mapping or its JSON text."""
    if value is None:
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"metadata is not valid JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise UserError(f"metadata is a value of type {type(value).__name__}; expected a mapping")
    return value


def _fields(row: Mapping[str, Any], count: int) -> dict[str, Numbers]:
    fields: dict[str, Numbers] = {}
    known = CANONICAL.union(_numbered(row))
    for name, value in row.items():
        if name in known:
            continue
        if _is_number(value):
            fields[name] = float(value)
        elif isinstance(value, list | tuple) and 0 < len(value) == count and all(_is_number(entry) for entry in value):
            fields[name] = tuple(float(entry) for entry in value)
    return fields


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _offers(columns: set[str], need: str) -> bool:
    if need == "images":
        return bool({"images", "image", "image_0"} & columns) or {"chosen", "rejected"} <= columns
    if need == "winner":
        return bool(set(_PREFERENCES) & columns) or {"chosen", "rejected"} <= columns
    return need in columns


def _listed(columns: Collection[str]) -> str:
    return ", ".join(sorted(columns)) or "no columns at all"

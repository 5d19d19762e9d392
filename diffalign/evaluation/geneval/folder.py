"""GenEval's folder of pictures: ``00000/metadata.jsonl``, ``00000/samples/00000.png``, ... one folder a caption."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.errors import UserError

METADATA = "metadata.jsonl"
SAMPLES = "samples"


@dataclass(frozen=True)
class Sample:
    """A picture with the row of its caption.

    Args:
        place: path relative to the folder, with slashes.
        metadata: the caption's row.
    """

    place: str
    metadata: Mapping[str, Any]


def read_folder(folder: Path, captions: int | None = None, allow_incomplete: bool = False) -> list[Sample]:
    """List the pictures of a folder in GenEval's layout, in the order of captions.

    Args:
        folder: its subfolders named by digits are read; anything else is left alone.
        captions: how many there must be, where that is known.
        allow_incomplete: accept fewer captions, and captions with fewer pictures than others.

    Raises:
        UserError: if it is no such folder, or something is missing.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    parts = sorted(
        (part for part in folder.iterdir() if part.is_dir() and part.name.isdigit()), key=lambda p: int(p.name)
    )
    if not parts:
        raise UserError(f"{folder} is not in GenEval's layout: expected folders 00000, 00001, ... with {METADATA}")
    if captions is not None and len(parts) != captions and not (allow_incomplete and len(parts) < captions):
        raise UserError(f"{folder} has pictures of {len(parts)} captions, expected {captions}")
    samples, counts = [], {}
    for part in parts:
        metadata = _metadata(part / METADATA)
        pictures = sorted((part / SAMPLES).glob("*.png")) if (part / SAMPLES).is_dir() else []
        pictures = [picture for picture in pictures if picture.stem.isdigit()]
        counts[part.name] = len(pictures)
        samples += [Sample(picture.relative_to(folder).as_posix(), metadata) for picture in pictures]
    if not allow_incomplete:
        usual = Counter(counts.values()).most_common(1)[0][0] or max(counts.values())
        if odd := [name for name, count in counts.items() if count != usual]:
            raise UserError(
                f"{len(odd)} of {len(parts)} captions in {folder} do not have {usual} pictures, first {odd[0]} with "
                f"{counts[odd[0]]}; draw what is missing, or allow incomplete folders"
            )
    if not samples:
        raise UserError(f"{folder} holds no pictures: expected {parts[0].name}/{SAMPLES}/00000.png and so on")
    return samples


def _metadata(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UserError(f"{path.parent} has no {METADATA} with the row of its caption")
    try:
        row = json.loads(path.read_text(encoding="utf-8").strip())
        if not {"tag", "include", "prompt"} <= set(row):
            raise ValueError("expected the keys tag, include and prompt")
    except (ValueError, TypeError) as problem:
        raise UserError(f"{path} is no row of a caption: {problem}") from problem
    result: Mapping[str, Any] = row
    return result

"""Published data sets in the canonical layout: one pure function a data set, recognised by its columns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from diffalign.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How a published data set lays out its rows.

    Args:
        name: of the data set.
        columns: those it is recognised by.
        convert: turns a row into the canonical columns.
        image_folders: folders, below that of the file, in which relative image paths are looked for.
    """

    name: str
    columns: frozenset[str]
    convert: Callable[[Mapping[str, Any]], Row]
    image_folders: tuple[str, ...] = ()


def from_pickapic(row: Mapping[str, Any]) -> Row:
    """Convert a row of Pick-a-Pic v1/v2: JPEG bytes in ``jpg_0``/``jpg_1``, ``caption``, ``label_0`` 1, 0 or 0.5 (tie).

    ``caption_0``/``caption_1`` are the images' own captions in the re-captioned subset used by DCPO.
    """
    label = row["label_0"]
    outcome: dict[float, int | None] = {1.0: 0, 0.0: 1, 0.5: None}
    if not isinstance(label, int | float) or label not in outcome:
        raise UserError(f"label_0 is {label!r}; expected 1 (jpg_0 preferred), 0 (jpg_1 preferred) or 0.5 (tie)")
    converted: Row = {"prompt": row["caption"], "images": [row["jpg_0"], row["jpg_1"]], "winner": outcome[label]}
    if row.get("caption_0") is not None and row.get("caption_1") is not None:
        converted["captions"] = [row["caption_0"], row["caption_1"]]
    return converted


def from_hpd_choice(row: Mapping[str, Any]) -> Row:
    """Convert a row of HPDv2's ``train.json``: ``file_path`` (or ``image_path``), ``human_preference`` 1 or 0 each."""
    votes = row["human_preference"]
    if not isinstance(votes, list) or any(vote not in (0, 1) for vote in votes) or sum(votes) > 1:
        raise UserError(f"human_preference is {votes!r}; expected one number an image, 1 for the preferred one, else 0")
    paths = row.get("file_path") or row.get("image_path")
    return {"prompt": row["prompt"], "images": paths, "winner": votes.index(1) if 1 in votes else None}


def from_hpd_ranks(row: Mapping[str, Any]) -> Row:
    """Convert a row of HPDv2's ``test.json``: ``image_path`` and ``rank``, each image's place (lower is better)."""
    ranks = row["rank"]
    if not isinstance(ranks, list) or not all(isinstance(rank, int | float) for rank in ranks):
        raise UserError(f"rank is {ranks!r}; expected one number an image, the place of that image")
    return {"prompt": row["prompt"], "images": row["image_path"], "scores": [-float(rank) for rank in ranks]}


def from_geneval(row: Mapping[str, Any]) -> Row:
    """Convert a row of GenEval's ``evaluation_metadata.jsonl``: the whole row describes its ``prompt``."""
    return {"prompt": row["prompt"], "metadata": dict(row)}


LAYOUTS: tuple[Layout, ...] = (
    Layout("Pick-a-Pic", frozenset({"jpg_0", "jpg_1", "label_0", "caption"}), from_pickapic),
    Layout("HPDv2 train", frozenset({"human_preference", "file_path"}), from_hpd_choice, ("train", "images")),
    Layout("HPDv2 train", frozenset({"human_preference", "image_path"}), from_hpd_choice, ("train", "images")),
    Layout("GenEval", frozenset({"tag", "include", "prompt"}), from_geneval),
    Layout("HPDv2 test", frozenset({"image_path", "rank"}), from_hpd_ranks, ("test", "images")),
)


def recognise(columns: Collection[str]) -> Layout | None:
    """Return the published layout with these columns; None where they are canonical, or unknown."""
    present = set(columns)
    if {"images", "image", "chosen"} & present:
        return None
    return next((layout for layout in LAYOUTS if layout.columns <= present), None)

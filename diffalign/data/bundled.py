"""The bundled preferences: images stored once, pairs and ranked lists referring to them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffalign.data.image_source import ImageSource
from diffalign.data.schema import HeldOut
from diffalign.data.table import Table
from diffalign.errors import UserError
from diffalign.strategies.base import DataKind

REWARDS = ("tiny-pickscore", "verifier", "graded")
"""Who judges images of held-out captions: the proxy first, then the exact verifier."""
GRADED = "graded"
"""Column of the verifier's graded scores, there for a column map that asks for it."""
_FILES: dict[DataKind, str] = {"ranked_lists": "lists", "prompts": "images", "mismatched_captions": "images"}


def read_bundled(folder: Path, kind: DataKind, mapped: Collection[str] = ()) -> Table:
    """Read a folder with ``images.parquet``, ``pairs.parquet`` and ``lists.parquet``.

    Ranked lists come from the lists, captions alone from all images, images beside a true and an edited caption from
    those that the verifier accepts (methods that edit captions take the unedited one for true), everything else from
    the pairs. Column ``scores`` is the proxy's; ``graded``, the share of satisfied checks of the exact verifier, can
    take its place. Rows hold it only where it is asked for: else it would reach methods as a field.

    Args:
        folder: where the files are.
        kind: what examples are wanted.
        mapped: columns that the user's column map names.

    Raises:
        UserError: if a file is missing.
    """
    file = _FILES.get(kind, "pairs")
    images = {row["image_id"]: row for row in _read_parquet(folder / "images.parquet")}
    sources = {key: ImageSource.from_bytes(row["image"], key) for key, row in images.items()}
    found = list(images.values()) if file == "images" else _read_parquet(folder / f"{file}.parquet")
    if kind == "mismatched_captions":
        found = [row for row in found if row["verifier"]]

    def rows() -> Iterator[Mapping[str, Any]]:
        for index, row in enumerate(found):
            ids = [] if kind == "prompts" else _image_ids(row, file)
            first = images[ids[0]] if ids else row
            values: dict[str, Any] = {
                "id": f"{file}-{index}",
                "prompt": first["prompt"],
                "images": [sources[key] for key in ids],
                "scores": [images[key]["proxy"] for key in ids],
                "metadata": first["metadata"],
            }
            if GRADED in mapped:
                values[GRADED] = [images[key]["graded"] for key in ids]
            yield values

    judged = all(GRADED in image for image in images.values())
    columns = frozenset({"id", "prompt", "images", "scores", "metadata", *([GRADED] if judged else [])})
    return Table("bundled preferences", columns, rows, held_out=held_out)


def held_out(split: str, count: int, seed: int) -> HeldOut:
    """Draw held-out captions of the bundled world; compositions of "tune" and "test" never occur in training data."""
    from diffalign.world import grammar

    records = grammar.prompts(split, count, seed)  # type: ignore[arg-type]
    return HeldOut(
        prompts=tuple(record.text for record in records),
        metadata=tuple(record.metadata for record in records),
        rewards=REWARDS,
    )


def _image_ids(row: Mapping[str, Any], file: str) -> list[str]:
    if file == "pairs":
        return [row["image_w"], row["image_l"]]
    return list(row["images"]) if file == "lists" else [row["image_id"]]


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    if not path.is_file():
        raise UserError(f"the bundled preferences lack {path.name}: reinstall diffalign, or rebuild its assets")
    return pyarrow.parquet.read_table(path).to_pylist()

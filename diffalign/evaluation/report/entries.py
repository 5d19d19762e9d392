"""What is known of each model: images, their scores, GenEval verdicts, the training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.evaluation.comparison import ImageSet, Key, read_set
from diffalign.evaluation.generation import TABLE
from diffalign.evaluation.geneval.evaluate import RESULTS, RESULTS_FOLDER
from diffalign.records import read_json, read_jsonl, read_yaml
from diffalign.training.runfolder import CONFIG_FILE
from diffalign.training.trackers import METRICS_FILE

GENEVAL = "geneval"
"""Name of GenEval's verdicts as a reward."""


@dataclass
class Entry:
    """A model of the comparison.

    Args:
        name: as the page calls it.
        images: its images; None if only a run is shown.
        scores: image -> reward -> score; "geneval" is 1 for a correct image and 0 for another.
        categories: image -> category of its caption.
        units: reward -> what its numbers mean.
        config: options of the training run; empty without one.
        curve: the run's metrics, one mapping a logging interval with the key "step".
    """

    name: str
    images: ImageSet | None = None
    scores: dict[Key, dict[str, float]] = field(default_factory=dict)
    categories: dict[Key, str] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)


def read_entries(sources: Sequence[str]) -> list[Entry]:
    """Read everything that is compared.

    Args:
        sources: ``NAME=PATH``, any number for a name: a folder of images (with ``images.jsonl`` or captions in text
            files; scores and GenEval's results in it are found), a file of scores, or the folder of a training run.

    Returns:
        one entry a name, in the order in which the names first appear.

    Raises:
        UserError: for another form, or a path that is none of these.
    """
    entries: dict[str, Entry] = {}
    tables: list[tuple[Entry, Path]] = []
    for source in sources:
        name, found, place = source.partition("=")
        if not (found and name and place):
            raise UserError(f"{source!r} is no source: expected NAME=PATH, for example base=images/base")
        entry, path = entries.setdefault(name, Entry(name)), Path(place)
        if path.is_file():
            tables.append((entry, path))
        elif is_run(path):
            _read_run(entry, path)
        elif path.is_dir():
            _read_images(entry, path)
            tables += [(entry, table) for table in sorted(path.glob("*.jsonl")) if _holds_scores(table)]
        else:
            raise UserError(f"there is nothing at {path}; expected images, a file of scores, or the folder of a run")
    for entry, table in tables:
        _read_scores(entry, table)
    return list(entries.values())


def is_run(folder: Path) -> bool:
    """Whether a folder holds a training run with its metrics."""
    return (folder / CONFIG_FILE).is_file() and (folder / METRICS_FILE).is_file()


def _read_images(entry: Entry, folder: Path) -> None:
    if entry.images is not None:
        raise UserError(f"{entry.name!r} has two folders of images; the second is {folder}")
    entry.images = read_set(folder)
    for key, item in entry.images.entries.items():
        if item.metadata and "tag" in item.metadata:
            entry.categories[key] = str(item.metadata["tag"])
    verdicts = folder / RESULTS_FOLDER / RESULTS
    if verdicts.is_file():
        _read_verdicts(entry, verdicts)


def _read_verdicts(entry: Entry, path: Path) -> None:
    """Read GenEval's results, in the official format."""
    by_place = _by_place(entry)
    for row in read_jsonl(path, ("filename", "tag", "correct")):
        key = _find(by_place, str(row["filename"]), path)
        entry.categories[key] = str(row["tag"])
        entry.scores.setdefault(key, {})[GENEVAL] = float(bool(row["correct"]))
    entry.units[GENEVAL] = "share of images that show what the caption asks for"


def _read_scores(entry: Entry, path: Path) -> None:
    """Read what ``diffalign score --output`` wrote."""
    if entry.images is None:
        raise UserError(f"{path} scores images of {entry.name!r}, of which no folder is given")
    by_place = _by_place(entry)
    for row in read_jsonl(path, ("image",)):
        entry.scores.setdefault(_find(by_place, str(row["image"]), path), {}).update(_scores_of(row))
    manifest = path.with_suffix(".manifest.json")
    if manifest.is_file():
        rewards = read_json(manifest).get("rewards", {})
        entry.units |= {label: str(info.get("unit", "")) for label, info in rewards.items()}


def _read_run(entry: Entry, folder: Path) -> None:
    if entry.curve:
        raise UserError(f"{entry.name!r} has two training runs; the second is {folder}")
    entry.config = read_yaml(folder / CONFIG_FILE)
    entry.curve = read_jsonl(folder / METRICS_FILE, ("step",))


def _scores_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a row but those that tell which image it is."""
    return {
        name: float(value)
        for name, value in row.items()
        if name not in {"index", "sample", "seed"} and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _holds_scores(path: Path) -> bool:
    if path.name == TABLE:
        return False
    first = read_jsonl(path)[0]
    return "image" in first and bool(_scores_of(first))


def _by_place(entry: Entry) -> dict[str, Key]:
    """Every ending of every path that belongs to one image alone."""
    assert entry.images is not None
    found: dict[str, Key | None] = {}
    for key, item in entry.images.entries.items():
        parts = item.image.absolute().parts
        for start in range(len(parts)):
            ending = "/".join(parts[start:])
            found[ending] = None if ending in found else key
    return {ending: key for ending, key in found.items() if key is not None}


def _find(by_place: Mapping[str, Key], name: str, table: Path) -> Key:
    """Find an image by the longest ending of its path: tables may have been written from another folder."""
    parts = Path(name).parts
    for start in range(len(parts)):
        if key := by_place.get("/".join(parts[start:])):
            return key
    raise UserError(f"{table} scores {name}, which is none of the images compared")

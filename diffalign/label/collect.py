"""Tasks from any data source that training reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

from diffalign.data.image_source import ImageSource, image_hash
from diffalign.data.readers import SourceOptions, open_records
from diffalign.data.schema import Record
from diffalign.errors import UserError
from diffalign.label.tasks import MOST_IMAGES, Task, TaskSet, image_format, media_type
from diffalign.records import write_bytes


def collect_tasks(
    source: str, unpacked: Path, images_per_task: int = 2, limit: int = 0, options: SourceOptions | None = None
) -> TaskSet:
    """Make tasks from a data source; preferences that it may hold already are not looked at.

    Rows with several images are tasks as they are. Rows of one image are gathered by caption and cut into tasks.

    Args:
        source: whatever ``--dataset_name`` takes: a folder of images, an annotation file, parquet, "bundled", ...
        unpacked: folder for the images of sources that hold them inside their tables; made only for those.
        images_per_task: images of a task where the source has one image a row; 1 to tag single images.
        limit: use only so many tasks; 0 for all.
        options: how rows are read.

    Raises:
        UserError: if the source cannot be read, an image is missing, broken or outside the folder of the source, or
            nothing is left to ask.
    """
    if not 1 <= images_per_task <= MOST_IMAGES:
        raise UserError(f"images_per_task is {images_per_task}; expected 1 to {MOST_IMAGES}")
    notes: Counter[str] = Counter()
    records = open_records(source, "winners", options or SourceOptions())
    questions = list(islice(_questions(records, images_per_task, notes), limit or None))
    if not questions:
        raise UserError(f"{source}: nothing to label: no caption has {images_per_task} image(s)")
    if all(image.path is not None for _, images, _ in questions for image in images):
        root = (Path(source) if Path(source).is_dir() else Path(source).parent).resolve()
        place = partial(_name_within, root)
    else:
        root = unpacked.resolve()
        place = partial(_unpack, root)
    tasks: dict[str, Task] = {}
    for prompt, images, metadata in questions:
        task = Task.of(prompt, [place(image) for image in images], metadata)
        notes["repeated rows left out"] += task.id in tasks
        tasks.setdefault(task.id, task)
    for name in dict.fromkeys(name for task in tasks.values() for name in task.images):
        media_type(root / name)
    return TaskSet(root, tuple(tasks.values()), {reason: count for reason, count in notes.items() if count})


def _questions(
    records: Iterable[Record], images_per_task: int, notes: Counter[str]
) -> Iterator[tuple[str, Sequence[ImageSource], Mapping[str, Any]]]:
    """Yield (caption, images, metadata): rows of several images at once, then single images gathered by caption."""
    single: dict[str, list[Record]] = {}
    for record in records:
        if len(record.images) > MOST_IMAGES:
            raise UserError(f"row {record.id!r} has {len(record.images)} images; a task shows at most {MOST_IMAGES}")
        if len(record.images) > 1:
            yield record.prompt, record.images, record.metadata
        elif record.images:
            single.setdefault(record.prompt, []).append(record)
    for prompt, rows in single.items():
        whole = len(rows) - len(rows) % images_per_task
        notes["images left out, too few of their caption"] += len(rows) - whole
        for start in range(0, whole, images_per_task):
            part = rows[start : start + images_per_task]
            yield prompt, [row.images[0] for row in part], part[0].metadata


def _name_within(root: Path, image: ImageSource) -> str:
    """Return the path of an image relative to the root; a link that leads out of it counts by where it leads."""
    assert image.path is not None
    resolved = image.path.resolve()
    if not resolved.is_relative_to(root):
        raise UserError(
            f"the image {image.name} lies outside {root}, from where alone images are served: give the folder that "
            "holds all of them, or an annotation file in it"
        )
    return resolved.relative_to(root).as_posix()


def _unpack(folder: Path, image: ImageSource) -> str:
    """Write an image that has no file of its own, once; returns its name."""
    data = image.read()
    name = f"{image_hash(data)[:16]}.{image_format(BytesIO(data), image.name).lower()}"
    target = folder / name
    if not target.is_file():
        write_bytes(target, data)
    return name

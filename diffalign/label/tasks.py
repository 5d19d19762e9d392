"""What people are asked: a caption and images of it, which are files of one folder. Light: imports no model library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from diffalign.errors import UserError

MEDIA_TYPES: Mapping[str, str] = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
}
"""Formats that browsers show and that carry no script."""
MOST_IMAGES = 9
"""Images of one task: each has a digit key."""


@dataclass(frozen=True, slots=True)
class Task:
    """One question.

    Args:
        id: hash of caption and images, so that a source can grow while votes stay with their tasks.
        prompt: the caption.
        images: files, as POSIX paths relative to the image folder.
        metadata: structured description of the caption; handed on to the export.
    """

    id: str
    prompt: str
    images: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, prompt: str, images: Sequence[str], metadata: Mapping[str, Any] | None = None) -> Task:
        """Build a task; its id follows from its content."""
        digest = hashlib.blake2b(json.dumps([prompt, *images]).encode(), digest_size=8)
        return cls(digest.hexdigest(), prompt, tuple(images), dict(metadata or {}))


@dataclass(frozen=True)
class TaskSet:
    """The questions of a session.

    Args:
        root: the image folder, resolved; nothing outside it is part of a task.
        tasks: the questions, in the order of the source.
        notes: reason -> number of rows or images left out.
    """

    root: Path
    tasks: tuple[Task, ...]
    notes: Mapping[str, int]


def media_type(path: Path) -> str:
    """Return the media type of an image file by its header, not by its name.

    Raises:
        UserError: if it cannot be read or is none of :data:`MEDIA_TYPES`.
    """
    return MEDIA_TYPES[image_format(path, str(path))]


def image_format(file: Path | BytesIO, name: str) -> str:
    """Return the format of an encoded image, a key of :data:`MEDIA_TYPES`.

    Raises:
        UserError: as :func:`media_type`; ``name`` names the image in it.
    """
    try:
        with Image.open(file) as image:
            found = image.format or ""
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        raise UserError(f"cannot read the image {name}: it is missing or no image") from None
    if found not in MEDIA_TYPES:
        raise UserError(f"the image {name} is of format {found}; the app shows {', '.join(MEDIA_TYPES)}")
    return found

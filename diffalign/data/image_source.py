"""A handle on one image: where its encoded bytes are, read only when needed."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from diffalign.errors import UserError


class UnreadableImage(UserError):
    """The bytes of an image are missing or do not decode."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """One image of a data set, not yet read.

    Args:
        name: unique in the data set: a path, an image id, or row and column; error messages and memos use it.
        load: returns the encoded bytes (JPEG, PNG, WebP, ...).
        path: its file, where it has one of its own.
    """

    name: str
    load: Callable[[], bytes]
    path: Path | None = None

    @classmethod
    def from_path(cls, path: Path, name: str | None = None) -> ImageSource:
        """Refer to an image file."""
        return cls(name or str(path), path.read_bytes, path)

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> ImageSource:
        """Hold encoded bytes."""
        return cls(name, lambda: data)

    @classmethod
    def from_value(cls, value: Any, name: str, root: Path | None = None) -> ImageSource:
        """Accept what columns of data sets hold.

        Args:
            value: encoded bytes, a path (relative ones start at ``root``), ``{"bytes": ..., "path": ...}`` as in the
                ``datasets`` library, or a PIL image.
            name: name of the image where the value has none.
            root: folder of relative paths.

        Raises:
            UserError: for anything else, None included.
        """
        if isinstance(value, ImageSource):
            return value
        if isinstance(value, bytes | bytearray):
            return cls.from_bytes(bytes(value), name)
        if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
            if value.get("bytes") is not None:
                return cls.from_bytes(value["bytes"], name)
            value = value.get("path")
        if isinstance(value, str | Path) and str(value):
            path = Path(value)
            return cls.from_path(path if path.is_absolute() or root is None else root / path, str(value))
        if isinstance(value, Image.Image):
            return cls(name, lambda: to_png(value))
        kind = "nothing" if value is None or value == "" else f"a value of type {type(value).__name__}"
        raise UserError(f"{name}: an image was expected (encoded bytes, a path or a PIL image), but there is {kind}")

    def read(self) -> bytes:
        """Return the encoded bytes.

        Raises:
            UnreadableImage: if they cannot be had.
        """
        try:
            data = self.load()
        except OSError as error:
            raise UnreadableImage(f"cannot read image {self.name!r}: {error.strerror or error}") from None
        if not data:
            raise UnreadableImage(f"image {self.name!r} is empty (0 bytes)")
        return data

    def decode(self, data: bytes | None = None) -> Image.Image:
        """Decode to RGB; transparent pixels lie on white.

        Args:
            data: the bytes, where the caller has read them already.

        Raises:
            UnreadableImage: if the bytes are no image or end early.
        """
        data = self.read() if data is None else data
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return _to_rgb(image)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise UnreadableImage(f"cannot decode image {self.name!r} ({len(data)} bytes): {_reason(error)}") from None

    def size(self, data: bytes | None = None) -> tuple[int, int]:
        """Return (height, width) in pixels from the header alone.

        Args:
            data: the bytes, where the caller has read them already.

        Raises:
            UnreadableImage: if there is no readable header.
        """
        data = self.read() if data is None else data
        try:
            with Image.open(io.BytesIO(data)) as image:
                return image.height, image.width
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise UnreadableImage(f"cannot decode image {self.name!r} ({len(data)} bytes): {_reason(error)}") from None


def image_hash(data: bytes) -> str:
    """Return the hash of an image's encoded bytes, as cache keys use it."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def to_png(image: Image.Image) -> bytes:
    """Return a picture's bytes as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    # PIL names its in-memory buffer, which tells nobody anything.
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    return str(error)

"""Handles on images: everything columns hold is accepted, what cannot be decoded is named."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from diffalign.data.image_source import ImageSource, UnreadableImage, image_hash
from diffalign.errors import UserError
from tests.data.support import broken, encoded, picture


def test_every_form_of_a_column_gives_the_same_pixels(tmp_path):
    data, image = encoded(3), picture(3)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    forms = [data, str(path), path, {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, image]
    for form in forms:
        source = ImageSource.from_value(form, "x")
        assert source.decode().tobytes() == image.tobytes()
        assert source.size() == (12, 12)
    assert ImageSource.from_value("a.png", "x", tmp_path).decode().tobytes() == image.tobytes()


@pytest.mark.parametrize("value", [None, "", 3, {"url": "x"}])
def test_anything_else_is_refused_by_name(value):
    with pytest.raises(UserError, match=r"row 4, jpg_0: an image was expected"):
        ImageSource.from_value(value, "row 4, jpg_0")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (broken("cut.png"), "cannot decode image 'cut.png'"),
        (ImageSource.from_bytes(b"no image", "text.png"), "no known image format"),
        (ImageSource.from_bytes(b"", "empty.png"), "'empty.png' is empty"),
        (ImageSource.from_value("missing.png", "x"), "cannot read image 'missing.png'"),
    ],
)
def test_unreadable_images_are_named(source, reason):
    with pytest.raises(UnreadableImage, match=reason):
        source.decode()


def test_transparency_lies_on_white():
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(buffer, "PNG")
    assert ImageSource.from_bytes(buffer.getvalue(), "x").decode().getpixel((0, 0)) == (255, 255, 255)


def test_hash_tells_images_apart():
    assert image_hash(encoded(1)) == image_hash(encoded(1)) != image_hash(encoded(2))

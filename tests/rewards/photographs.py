"""Real photographs: those that the package scikit-image carries (public domain or CC0)."""

from __future__ import annotations

import importlib.util
import io
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from diffalign.rewards.weights import weights_folder


def photograph(name: str) -> Image.Image:
    """Return "chelsea" (a cat, 451 x 300), "coffee" (a cup on a table, 600 x 400) or "astronaut" (512 x 512).

    The test is skipped where scikit-image is neither installed nor its wheel in the weights folder.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is not None and spec.origin is not None:
        return Image.open(Path(spec.origin).parent / "data" / f"{name}.png").convert("RGB")
    for wheel in weights_folder().glob("scikit_image-*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            return Image.open(io.BytesIO(archive.read(f"skimage/data/{name}.png"))).convert("RGB")
    pytest.skip(f"no photographs: pip download --no-deps -d {weights_folder()} scikit-image")

"""Small images, rows and a policy that counts what it is asked to encode."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.batch import Condition
from diffalign.data.image_source import ImageSource
from diffalign.data.schema import Example


def picture(seed: int, height: int = 12, width: int = 12) -> Image.Image:
    """An image of random pixels; other seeds give other images."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(seed: int, height: int = 12, width: int = 12, format: str = "PNG") -> bytes:
    """The same, encoded."""
    buffer = io.BytesIO()
    picture(seed, height, width).save(buffer, format=format)
    return buffer.getvalue()


def source(seed: int, height: int = 12, width: int = 12) -> ImageSource:
    """A handle on such an image."""
    return ImageSource.from_bytes(encoded(seed, height, width), f"image-{seed}")


def watched(name: str, data: bytes, reads: list[str]) -> ImageSource:
    """A handle that notes each time its image is read."""

    def load() -> bytes:
        reads.append(name)
        return data

    return ImageSource(name, load)


def broken(name: str = "broken") -> ImageSource:
    """A handle on an image whose file ends early."""
    return ImageSource.from_bytes(encoded(0)[:60], name)


def pair(index: int, **fields: Any) -> Example:
    """A pair with images and caption of its own."""
    return Example(f"pair-{index}", (f"caption {index}",) * 2, (source(2 * index), source(2 * index + 1)), fields)


def write_images(folder: Path, names: Sequence[str]) -> None:
    """Write one image for each name."""
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path)


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows, one a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class CountingPolicy:
    """Encodes by pooling pixels and counting letters; remembers what it was asked.

    Args:
        channels: channels it promises; its latents always have three.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    default_resolution = (8, 8)

    def __init__(self, channels: int = 3) -> None:
        self.images = 0
        self.prompts: list[str] = []
        self.sizes: Mapping[str, Tensor] = {}
        self._channels = channels

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return self._channels, height // 2, width // 2

    def encode_images(self, pixels: Tensor) -> Tensor:
        self.images += len(pixels)
        return torch.nn.functional.avg_pool2d(pixels, 2)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        self.prompts += prompts
        return Condition({"prompt_embeds": torch.tensor([[float(sum(map(ord, p)))] for p in prompts])})

    def with_size(self, condition: Condition, sizes: Mapping[str, Tensor]) -> Condition:
        self.sizes = sizes
        return Condition({**condition.tensors, "crop": sizes["crop_top_left"]})

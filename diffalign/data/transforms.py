"""From a decoded image to pixels of the training size.

Where to crop and whether to mirror is decided once for an example and shared by all its images: drawing it for each
image, as some official scripts do, puts chosen and rejected into different frames and makes their latents uncacheable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.diffusion.random import derive_seed


@dataclass(frozen=True)
class Framing:
    """How an example is framed, independent of the size of its images.

    Args:
        across: share of the surplus width that is cut on the left, in [0, 1].
        down: share of the surplus height that is cut at the top, in [0, 1].
        flip: mirror left and right.
    """

    across: float = 0.5
    down: float = 0.5
    flip: bool = False


@dataclass(frozen=True)
class Placement:
    """A framing carried out on an image of a given size.

    Args:
        height, width: size after resizing; the training size fits into it and touches at least one pair of sides.
        top, left: offset of the crop.
        flip: mirror left and right after cropping.
    """

    height: int
    width: int
    top: int
    left: int
    flip: bool


def draw_framing(seed: int, center_crop: bool = True, random_flip: bool = False) -> Framing:
    """Decide the framing of an example from its seed.

    Args:
        seed: the example's seed.
        center_crop: crop the centre; otherwise a place drawn uniformly.
        random_flip: mirror half of the examples.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "framing"))
    across, down, coin = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    if center_crop:
        across = down = 0.5
    return Framing(across, down, random_flip and coin < 0.5)


def place(image_size: tuple[int, int], target: tuple[int, int], framing: Framing) -> Placement:
    """Scale an image so that it just covers the target and place the crop.

    Args:
        image_size: (height, width) of the image.
        target: (height, width) of the training size.
        framing: where to crop.
    """
    scale = max(target[0] / image_size[0], target[1] / image_size[1])
    height = max(target[0], round(image_size[0] * scale))
    width = max(target[1], round(image_size[1] * scale))
    top = round((height - target[0]) * framing.down)
    left = round((width - target[1]) * framing.across)
    return Placement(height, width, top, left, framing.flip)


def to_pixels(image: Image.Image, placement: Placement, target: tuple[int, int]) -> Tensor:
    """Resize, crop, mirror.

    Args:
        image: RGB image.
        placement: from :func:`place` for this image's size.
        target: (height, width).

    Returns:
        (3, height, width) uint8, a quarter of the memory of what the encoder takes; see :func:`centred`.
    """
    if image.size != (placement.width, placement.height):
        image = image.resize((placement.width, placement.height), Image.Resampling.LANCZOS)
    left, top = placement.left, placement.top
    image = image.crop((left, top, left + target[1], top + target[0]))
    if placement.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    array = np.asarray(image, dtype=np.uint8).copy()
    return torch.from_numpy(array).permute(2, 0, 1)


def centred(pixels: Tensor) -> Tensor:
    """Return pixels of 0 to 255 as float32 in [-1, 1], shaped as they are."""
    return pixels.float().div_(127.5).sub_(1.0)


def aspect_buckets(resolution: tuple[int, int], max_ratio: float = 2.0) -> list[tuple[int, int]]:
    """List training sizes of about the area of the resolution, from wide to tall.

    Sides are multiples of a sixteenth of the shorter side, at least 8 pixels (64 for 1024, 32 for 512), so that every
    size suits the usual latents and patches.

    Args:
        resolution: (height, width) whose area the sizes share; always among them.
        max_ratio: longest side over shortest side.

    Returns:
        (height, width) of each bucket.
    """
    step = max(8, min(resolution) // 16 // 8 * 8)
    area = resolution[0] * resolution[1]
    sizes = {resolution}
    width = step
    while width <= math.sqrt(area * max_ratio) + step:
        height = int(area / width / step) * step
        if height and max(height / width, width / height) <= max_ratio:
            sizes |= {(height, width), (width, height)}
        width += step
    return sorted(sizes, key=lambda size: (size[0] / size[1], size))


def assign_bucket(image_sizes: Sequence[tuple[int, int]], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Choose the bucket of an example: one for all its images.

    Args:
        image_sizes: (height, width) of each image of the example.
        buckets: sizes to choose from.

    Returns:
        the bucket whose shape is nearest to the images' mean shape (ratios compared by their logarithm).
    """
    mean = sum(math.log(height / width) for height, width in image_sizes) / len(image_sizes)
    return min(buckets, key=lambda size: (abs(math.log(size[0] / size[1]) - mean), size))

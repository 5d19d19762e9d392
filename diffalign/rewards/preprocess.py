"""Image preprocessing of CLIP-like towers: tensor operations, so that gradients pass, and the exact PIL pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of OpenAI's and LAION's CLIP towers, and of BLIP."""
PILLOW = int(PIL.__version__.partition(".")[0])


def to_tensor(picture: Image.Image) -> Tensor:
    """Turn a picture into (3, height, width) in [0, 1]; transparency and palettes become RGB."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtract the mean and divide by the deviation of each channel; images (..., 3, height, width)."""
    centre, scale = (torch.tensor(v, dtype=images.dtype, device=images.device).view(3, 1, 1) for v in (mean, std))
    return (images - centre) / scale


def resized_as_by_pil(images: Tensor, size: Sequence[int]) -> Tensor:
    """Resize images (..., 3, height, width) in [0, 1] to (height, width): bicubic, antialiased, differentiable.

    PIL resizes one side after the other and keeps grey levels within their range after each pass: where the first one
    overshoots, clamping at the end alone gives another picture. What still differs is PIL's rounding.
    """
    height, width = size
    between = (height, images.shape[-1]) if _height_first(images, size) else (images.shape[-2], width)
    for shape in (between, (height, width)):
        if shape != tuple(images.shape[-2:]):
            images = F.interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return images


def _height_first(images: Tensor, size: Sequence[int]) -> bool:
    """Whether the installed PIL resizes the height before the width; those before 13 never do."""
    rows, columns = (have - want for have, want in zip(images.shape[-2:], size, strict=True))
    return PILLOW >= 13 and rows > max(0, 2 * columns)


@dataclass(frozen=True)
class ClipPreprocess:
    """Shortest side to ``shortest_edge`` (bicubic, antialiased), centre crop to a square, normalise.

    Args:
        size: side of the square in pixels; black surrounds a picture that is smaller once resized.
        mean, std: per channel, of pixels in [0, 1].
        shortest_edge: pixels of the shortest side before the crop, ``size`` by default.
    """

    size: int
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    shortest_edge: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ClipPreprocess:
        """Read a transformers image processor's configuration.

        Raises:
            UserError: if it resizes to other than a shortest side, or crops to other than a square.
        """
        # Processors of old say one number where newer ones say which side it is of.
        crop, resized = config["crop_size"], config.get("size", config["crop_size"])
        sides = set(crop.values()) if isinstance(crop, Mapping) else {int(crop)}
        edge = resized.get("shortest_edge") if isinstance(resized, Mapping) else int(resized)
        if edge is None or len(sides) != 1:
            raise UserError(
                f"the image processor resizes to {resized} and crops to {crop}: expected a shortest_edge and a square"
            )
        return cls(sides.pop(), tuple(config["image_mean"]), tuple(config["image_std"]), edge)

    @property
    def edge(self) -> int:
        """Pixels of the shortest side after resizing."""
        return self.size if self.shortest_edge is None else self.shortest_edge

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare images (batch, 3, height, width) in [0, 1]; returns (batch, 3, size, size)."""
        images = resized_as_by_pil(images, self._resized(*images.shape[-2:]))
        return normalise(self._cropped(images), self.mean, self.std)

    def exact(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Prepare pictures as the official pipeline does, which rounds to whole grey levels after resizing."""
        prepared = []
        for picture in pictures:
            height, width = self._resized(picture.height, picture.width)
            resized = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            prepared.append(self._cropped(to_tensor(resized)))
        return normalise(torch.stack(prepared), self.mean, self.std)

    def _resized(self, height: int, width: int) -> list[int]:
        short = min(height, width)
        # Sizes as transformers computes them: the longer side is truncated, not rounded.
        return [self.edge if side == short else self.edge * side // short for side in (height, width)]

    def _cropped(self, images: Tensor) -> Tensor:
        rows, columns = (max(0, self.size - side) for side in images.shape[-2:])
        if rows or columns:
            # Of an odd border transformers' PIL pipeline puts the larger part above and on the left.
            images = F.pad(images, (columns - columns // 2, columns // 2, rows - rows // 2, rows // 2))
        top, left = (images.shape[-2] - self.size) // 2, (images.shape[-1] - self.size) // 2
        return images[..., top : top + self.size, left : left + self.size]


@dataclass(frozen=True)
class PadPreprocess:
    """Longest side to ``size`` (bicubic, antialiased), black bars to a square, normalise: HPSv2's transform.

    The official pipeline works on tensors too, so that there is nothing to round.

    Args:
        size: side of the square in pixels.
        mean, std: per channel, of pixels in [0, 1].
    """

    size: int
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare images (batch, 3, height, width) in [0, 1]; returns (batch, 3, size, size)."""
        scale = self.size / max(images.shape[-2:])
        height, width = (round(side * scale) for side in images.shape[-2:])
        if (height, width) != tuple(images.shape[-2:]):
            images = F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)
        rows, columns = self.size - height, self.size - width
        images = F.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return normalise(images, self.mean, self.std)

    def exact(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Prepare pictures of any sizes."""
        return torch.cat([self(to_tensor(picture)[None]) for picture in pictures])


Preprocess = ClipPreprocess | PadPreprocess

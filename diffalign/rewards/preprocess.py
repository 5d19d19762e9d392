"""Image preprocessing of CLIP-like towers as tensor operations, so that gradients pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ClipPreprocess:
    """Shortest side to ``size`` (bicubic, antialiased), centre crop to a square, normalise.

    Args:
        size: side of the square in pixels.
        mean, std: per channel, of pixels in [0, 1].
    """

    size: int
    mean: Sequence[float]
    std: Sequence[float]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ClipPreprocess:
        """Read a transformers image processor's configuration."""
        crop = config["crop_size"]
        side = crop["height"] if isinstance(crop, Mapping) else int(crop)
        return cls(side, tuple(config["image_mean"]), tuple(config["image_std"]))

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare images (batch, 3, height, width) in [0, 1]; returns (batch, 3, size, size)."""
        height, width = images.shape[-2:]
        if min(height, width) != self.size:
            scale = self.size / min(height, width)
            # Sizes as transformers computes them: the longer side is truncated, not rounded.
            shape = [self.size if side == min(height, width) else int(side * scale) for side in (height, width)]
            images = F.interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = (images.shape[-2] - self.size) // 2, (images.shape[-1] - self.size) // 2
        images = images[..., top : top + self.size, left : left + self.size]
        mean, std = (
            torch.tensor(v, dtype=images.dtype, device=images.device).view(3, 1, 1) for v in (self.mean, self.std)
        )
        return (images - mean) / std

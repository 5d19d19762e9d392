"""JPEG (in)compressibility (DDPO, arXiv 2305.13301): a reward without a network, known to be trainable."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from diffalign.rewards.base import Metadata, Reward, RewardInfo
from diffalign.rewards.registry import LoadOptions, no_source, register

QUALITY = 95
"""As in the official code of DDPO."""


class JpegSize(Reward):
    """Size of the image as a JPEG file of quality 95, in kilobytes of 1,000 bytes.

    Args:
        compressible: reward small files: the negated size.
    """

    def __init__(self, compressible: bool) -> None:
        self.sign = -1.0 if compressible else 1.0
        self.info = RewardInfo(
            "compressibility" if compressible else "incompressibility",
            "kilobytes as JPEG of quality 95" + (", negated" if compressible else ""),
            (-math.inf, 0.0) if compressible else (0.0, math.inf),
            differentiable=False,
        )

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        """Return sizes, (batch,) float32 on the images' device."""
        pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        sizes = [jpeg_bytes(Image.fromarray(image)) / 1000 for image in pixels]
        return self.sign * torch.tensor(sizes, device=images.device)


def jpeg_bytes(picture: Image.Image) -> int:
    """Count the bytes of a picture as JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()


@register("compressibility", summary="small JPEG files: kilobytes, negated", paper="arXiv 2305.13301")
def _load_small(options: LoadOptions) -> Reward:
    no_source("compressibility", options)
    return JpegSize(compressible=True)


@register("incompressibility", summary="large JPEG files: kilobytes", paper="arXiv 2305.13301")
def _load_large(options: LoadOptions) -> Reward:
    no_source("incompressibility", options)
    return JpegSize(compressible=False)

"""How far samples have moved from those of the start, and whether they are about to collapse; no network is needed.

A reward that is being gamed keeps rising while samples leave the start ever further, lose their variety or turn gaudy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffalign.policies.saving import write_safetensors


@dataclass(frozen=True)
class Samples:
    """Images of fixed captions and seeds.

    Args:
        latents: (n, channels, ...) of the images.
        images: (n, 3, height, width) in [0, 1], rounded to the 256 levels of an image file.
    """

    latents: Tensor
    images: Tensor

    def save(self, path: Path) -> None:
        """Write to a safetensors file.

        Raises:
            UserError: if it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (self.images * 255).round().to(torch.uint8)
        write_safetensors(path, {"latents": self.latents.contiguous(), "images": pixels.contiguous()}, {})

    @staticmethod
    def load(path: Path) -> Samples:
        """Read what :meth:`save` wrote."""
        tensors = load_file(path)
        return Samples(tensors["latents"], tensors["images"].float() / 255)


def drift(start: Samples, now: Samples) -> dict[str, float]:
    """Return the root mean square distance of each sample to that of the start, averaged: in latents and in pixels."""
    return {
        "drift/latent": _distance(start.latents, now.latents).mean().item(),
        "drift/pixel": _distance(start.images, now.images).mean().item(),
    }


def appearance(images: Tensor) -> dict[str, float]:
    """Return what collapse shows in first.

    Args:
        images: (n, 3, height, width) in [0, 1].

    Returns:
        ``samples/colourfulness`` (Hasler and Suesstrunk 2003, on the scale of 256 levels: 0 grey, above 80 gaudy), and
        for two images or more ``samples/diversity``, the root mean square distance of two of them, averaged.
    """
    figures = {"samples/colourfulness": _colourfulness(images).mean().item()}
    if len(images) > 1:
        first, second = torch.triu_indices(len(images), len(images), offset=1)
        figures["samples/diversity"] = _distance(images[first], images[second]).mean().item()
    return figures


def _distance(first: Tensor, second: Tensor) -> Tensor:
    """Root mean square differences, (n,)."""
    return (first.float() - second.float()).flatten(1).square().mean(dim=1).sqrt()


def _colourfulness(images: Tensor) -> Tensor:
    red, green, blue = (255 * images.float()).flatten(2).unbind(dim=1)
    axes = torch.stack([red - green, 0.5 * (red + green) - blue])  # (2, n, pixels)
    spread = axes.var(dim=2, unbiased=False).sum(dim=0).sqrt()
    return spread + 0.3 * axes.mean(dim=2).square().sum(dim=0).sqrt()

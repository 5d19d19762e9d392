"""Between pixels and the latents a denoiser works on: scaling, shifting, chunking, overflow checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import UserError


class NonFiniteLatents(UserError):
    """The VAE overflowed.

    Args:
        rows: where, among the encoded rows.
        what: names of the images, or the rows' numbers.
        dtype: of the VAE.
    """

    def __init__(self, rows: Sequence[int], what: str, dtype: torch.dtype) -> None:
        super().__init__(
            f"the VAE (in {dtype}) gave latents that are not finite for {what}: half precision overflows in many VAEs; "
            "load the model in float32 or bfloat16"
        )
        self.rows, self.dtype = tuple(rows), dtype


class LatentCodec:
    """A VAE with its scale, so that nobody else needs to know it.

    The VAE computes in the type of its weights, in a run's mixed precision too: in half precision many overflow.

    Args:
        vae: an ``AutoencoderKL``, ``AutoencoderTiny``, or another autoencoder of diffusers with ``encode``/``decode``.
        downsampling: pixels a latent, along each side.
    """

    def __init__(self, vae: Any, downsampling: int) -> None:
        self._vae = vae
        self.downsampling = downsampling
        self.channels: int = vae.config.latent_channels
        config = vae.config
        scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            self._shift, self._scale = torch.tensor(mean).view(-1, 1, 1), scale / torch.tensor(std).view(-1, 1, 1)
        else:
            self._shift, self._scale = torch.tensor(float(shift)), torch.tensor(float(scale))

    def __repr__(self) -> str:
        scale, shift = self._scale.flatten().tolist(), self._shift.flatten().tolist()
        return f"LatentCodec({self.downsampling}, {self.channels}, {scale}, {shift})"

    @torch.no_grad()
    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode pixels (rows, 3, height, width) in [-1, 1] to float32 latents; the posterior mean without generator.

        Raises:
            NonFiniteLatents: if latents are not finite.
        """
        with self._own_precision():
            encoded = self._vae.encode(pixels.to(self._vae.device, self._vae.dtype))
        if hasattr(encoded, "latents"):
            latents = encoded.latents
        else:
            posterior = encoded.latent_dist
            latents = posterior.mode() if generator is None else posterior.sample(generator)
        if not latents.isfinite().all():
            rows = (~latents.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
            raise NonFiniteLatents(rows, f"rows {rows} of {len(pixels)}", self._vae.dtype)
        return (latents.float() - self._shift.to(latents.device)) * self._scale.to(latents.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to float32 pixels (rows, 3, height, width) in [0, 1], differentiably."""
        unscaled = latents.float() / self._scale.to(latents.device) + self._shift.to(latents.device)
        with self._own_precision():
            pixels = self._vae.decode(unscaled.to(self._vae.device, self._vae.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def _own_precision(self) -> torch.autocast:
        return torch.autocast(self._vae.device.type, enabled=False)

    def enable_slicing(self) -> None:
        """Encode and decode one image at a time."""
        self._vae.enable_slicing()

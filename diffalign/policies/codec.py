"""Between pixels and the latents a denoiser works on: scaling, shifting, chunking, overflow checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffalign.errors import UserError

_PIXELS_AT_ONCE = 2**20
"""One image of 1024x1024, or 16 of 256x256: work enough, and memory that a device must have for one image anyway.
The decoders of SD, SDXL and SD3 hold 256 channels at full size: 512 MiB an image in half precision, several times over.
"""


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

    The VAE computes in the type of its weights, in a run's mixed precision too: in half precision many overflow. It
    sees as many rows at once as have ``_PIXELS_AT_ONCE`` pixels, at least one, however many are asked for.

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
        height, width = pixels.shape[-2:]
        encoded = self._in_parts(self._vae.encode, pixels, height * width)
        if hasattr(encoded[0], "latents"):
            latents = torch.cat([part.latents for part in encoded])
        else:
            parameters = torch.cat([part.latent_dist.parameters for part in encoded])
            posterior = type(encoded[0].latent_dist)(parameters)
            latents = posterior.mode() if generator is None else posterior.sample(generator)
        if not latents.isfinite().all():
            rows = (~latents.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
            raise NonFiniteLatents(rows, f"rows {rows} of {len(pixels)}", self._vae.dtype)
        return (latents.float() - self._shift.to(latents.device)) * self._scale.to(latents.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to float32 pixels (rows, 3, height, width) in [0, 1], differentiably.

        For a gradient only the latents are kept. A decoder's activations, gigabytes for an image of 512 pixels, are
        computed again in backward: one part of the rows at a time, and block by block where the VAE can.
        """
        unscaled = latents.float() / self._scale.to(latents.device) + self._shift.to(latents.device)
        height, width = (side * self.downsampling for side in latents.shape[-2:])
        network = self._decode_part
        if torch.is_grad_enabled() and latents.requires_grad:
            network = partial(checkpoint, self._decode_part, use_reentrant=False)
        decoded = self._in_parts(network, unscaled, height * width)
        return (torch.cat(decoded).float() / 2 + 0.5).clamp(0, 1)

    def _decode_part(self, latents: Tensor) -> Tensor:
        blocks = getattr(self._vae, "_supports_gradient_checkpointing", False)
        if not torch.is_grad_enabled() or not blocks or self._vae.is_gradient_checkpointing:
            return self._vae.decode(latents, return_dict=False)[0]
        self._vae.enable_gradient_checkpointing()
        try:
            return self._vae.decode(latents, return_dict=False)[0]
        finally:
            self._vae.disable_gradient_checkpointing()

    def _in_parts(self, network: Callable[[Tensor], Any], rows: Tensor, pixels: int) -> list[Any]:
        """Return what a network makes of rows of so many pixels each, part by part."""
        device, dtype = self._vae.device, self._vae.dtype
        with torch.autocast(device.type, enabled=False):
            return [network(part.to(device, dtype)) for part in rows.split(max(1, _PIXELS_AT_ONCE // pixels))]

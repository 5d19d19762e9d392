"""Noise levels: how much of an image and how much of the noise a noisy latent holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """A noise level for each row: ``x = alpha * x0 + sigma * epsilon``.

    Levels, not timesteps, are what all arithmetic runs on, so that nothing depends on how a scheduler numbers them.

    Args:
        alpha: (rows,) factor of the clean latents, in [0, 1]; float64, float32 on devices without it.
        sigma: (rows,) factor of the noise, in [0, 1].
    """

    alpha: Tensor
    sigma: Tensor

    def select(self, rows: Tensor | slice) -> Level:
        """Return the given rows."""
        return Level(self.alpha[rows], self.sigma[rows])

    def repeat(self, rows: int) -> Level:
        """Return a level of one row for a number of rows."""
        return Level(self.alpha.expand(rows), self.sigma.expand(rows))

    def to(self, device: torch.device) -> Level:
        """Move to a device."""
        return Level(*(part.to(device, exact_dtype(device)) for part in self))

    def like(self, latents: Tensor) -> Level:
        """Return the level in the type (at least float32) and on the device of ``latents``, shaped (rows, 1, ...)."""
        dtype = torch.promote_types(latents.dtype, torch.float32)
        shape = (-1,) + (1,) * (latents.dim() - 1)
        return Level(*(part.to(latents.device, dtype).reshape(shape) for part in self))

    @staticmethod
    def cat(levels: list[Level]) -> Level:
        """Join levels row-wise."""
        return Level(torch.cat([level.alpha for level in levels]), torch.cat([level.sigma for level in levels]))


@dataclass(frozen=True)
class Grid:
    """The moves of a sampler, from noise to image.

    Move ``i`` evaluates the network at ``timesteps[i]`` on latents taken to be at ``sources[i]`` and leads to
    ``destinations[i]``. Source and previous destination are the same level in most samplers; where the stride does not
    divide the number of training timesteps, DDIM as published rounds them apart, and so does the grid.

    Args:
        timesteps: (n,) descending model-facing timesteps.
        sources: (n,) levels.
        destinations: (n,) levels.
        noise_scale: factor on standard normal noise that gives the latents of the first source. It is 1 but for Euler's
            sampler with "trailing" or "linspace" spacing, which leaves out the trace of an image at the first level.
    """

    timesteps: Tensor
    sources: Level
    destinations: Level
    noise_scale: float = 1.0

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def levels(self) -> Level:
        """(n + 1,) levels visited: every source, then the last destination."""
        return Level.cat([self.sources, self.destinations.select(slice(-1, None))])

    def move(self, index: int) -> tuple[Tensor, Level, Level]:
        """Return timestep (1,), source (1,) and destination (1,) of a move."""
        here = slice(index, index + 1)
        return self.timesteps[here], self.sources.select(here), self.destinations.select(here)

    def to(self, device: torch.device) -> Grid:
        """Move to a device."""
        return replace(
            self,
            timesteps=self.timesteps.to(device),
            sources=self.sources.to(device),
            destinations=self.destinations.to(device),
        )


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return the type that levels have on a device: float64 wherever there is one."""
    return torch.float32 if device.type == "mps" else torch.float64

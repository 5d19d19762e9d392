"""The sampler with randomness of a noise process, as a row of Gaussian transitions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffalign.diffusion.base import NoiseProcess
from diffalign.diffusion.flow import FlowProcess
from diffalign.diffusion.level import Grid
from diffalign.diffusion.sde import (
    Transition,
    ddim_transition,
    flow_transition,
    growing_noise_level,
    stochastic_grid,
)
from diffalign.errors import UserError

NoiseSchedule = Literal["growing", "constant"]


class StochasticSteps:
    """DDIM with eta for discrete processes, the SDE of Flow-GRPO and DanceGRPO for rectified flow.

    Args:
        process: the noise process.
        num_steps: moves from noise to image.
        eta: share of DDIM's randomness, in (0, 1]. 1: official code of DDPO.
        noise_level: scale of the noise of flow models. 0.7: official code of Flow-GRPO (DanceGRPO 0.3).
        noise_schedule: "growing" with the share of noise (Flow-GRPO), or "constant" (DanceGRPO).

    Raises:
        UserError: if the steps would have no randomness, hence no density, or their number does not fit.
    """

    def __init__(
        self,
        process: NoiseProcess,
        num_steps: int,
        eta: float = 1.0,
        noise_level: float = 0.7,
        noise_schedule: NoiseSchedule = "growing",
    ) -> None:
        if not 0 < eta <= 1:
            raise UserError(f"eta is {eta}: expected a number in (0, 1]; without randomness a step has no density")
        if noise_level <= 0:
            raise UserError(f"noise_level is {noise_level}: expected a number above 0, else a step has no density")
        self.process, self._eta, self._scale, self._schedule = process, eta, noise_level, noise_schedule
        self._grid = stochastic_grid(process, num_steps)
        self._copies: dict[torch.device, Grid] = {}
        if isinstance(process, FlowProcess) and len(self._grid) < 2:
            raise UserError("a flow model needs 2 steps at least: the first one has the noise level of the second")

    def __len__(self) -> int:
        return len(self._grid)

    @property
    def noise_scale(self) -> float:
        """Factor on standard normal noise that gives the latents of the first step."""
        return self._grid.noise_scale

    def timesteps(self, step: int | Tensor, rows: int, device: torch.device) -> Tensor:
        """Return the model-facing timesteps of a step, or of a step for each row, (rows,)."""
        return self._on(device).timesteps[_index(step, device)].expand(rows)

    def extent(self, step: int | Tensor) -> Tensor:
        """Return the time ``-dt`` that a step of a flow takes, (1,) or (rows,); 1 for discrete processes."""
        index = _index(step, torch.device("cpu"))
        drop = self._grid.sources.sigma[index] - self._grid.destinations.sigma[index]
        return drop.float() if isinstance(self.process, FlowProcess) else torch.ones(len(drop))

    def transition(self, step: int | Tensor, prediction: Tensor, latents: Tensor) -> Transition:
        """Return the distribution of the latents after a step.

        Args:
            step: index of the move, or (rows,) one a row.
            prediction: (rows, channels, ...) the network's output, guidance included; a graph is kept.
            latents: (rows, channels, ...) before the move.
        """
        grid, index = self._on(latents.device), _index(step, latents.device)
        source, destination = grid.sources.select(index), grid.destinations.select(index)
        if not isinstance(self.process, FlowProcess):
            return ddim_transition(self.process, prediction, latents, source, destination, self._eta)
        level: Tensor | float = self._scale
        if self._schedule == "growing":
            level = growing_noise_level(source.sigma, grid.sources.sigma[1], self._scale)
        return flow_transition(prediction, latents, source, destination, level)

    def _on(self, device: torch.device) -> Grid:
        """The grid on a device, sent there once."""
        if device not in self._copies:
            self._copies[device] = self._grid.to(device)
        return self._copies[device]


def _index(step: int | Tensor, device: torch.device) -> slice | Tensor:
    """Return what takes moves out of a grid on a device, as (1,) or (rows,); a whole number is not sent there."""
    return slice(step, step + 1) if isinstance(step, int) else step.to(device).reshape(-1)

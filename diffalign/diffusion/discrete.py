"""Variance-preserving processes over integer timesteps: Stable Diffusion, SDXL, PixArt, CogVideoX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffalign.diffusion.base import NoiseProcess, check_steps
from diffalign.diffusion.level import Grid, Level
from diffalign.diffusion.parameterization import PredictionType
from diffalign.diffusion.schedules import cumulative_alphas, make_betas, rescale_to_zero_snr, shift_snr
from diffalign.errors import UserError, unknown

Spacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True)
class Conventions:
    """How a scheduler class of diffusers reads its config; the default is DDIM's.

    Args:
        spacing: its default ``timestep_spacing``.
        strides: whether a move ends one stride below its start rather than at the next timestep of the grid.
        clips: its default ``clip_sample``; None where it never clips, whatever the config says.
        clean_to_one: its default ``set_alpha_to_one``; None where it always ends at exactly no noise.
        scales_noise: whether its ``init_noise_sigma`` is the largest sigma.
        betas: its default (schedule, start, end).
        snr_shift: its default ``snr_shift_scale``; None where it knows no such option.
    """

    spacing: Spacing = "leading"
    strides: bool = True
    clips: bool | None = True
    clean_to_one: bool | None = True
    scales_noise: bool = False
    betas: tuple[str, float, float] = ("linear", 0.0001, 0.02)
    snr_shift: float | None = None


DDIM = Conventions()


class DiscreteProcess(NoiseProcess):
    """``alpha = sqrt(abar_t)``, ``sigma = sqrt(1 - abar_t)`` for t = 0 .. T-1.

    Example::

        process = DiscreteProcess(cumulative_alphas(make_betas("scaled_linear", 1000, 0.00085, 0.012)))
        timesteps = process.sample_timesteps(4, torch.Generator().manual_seed(0))
        noisy = process.add_noise(latents, noise, timesteps)

    Args:
        alphas_cumprod: (T,) the abar, decreasing.
        prediction_type: "epsilon", "v_prediction" or "sample".
        clean_alpha_to_one: sampling ends at exactly no noise; otherwise at the level of timestep 0, as Stable
            Diffusion does (diffusers' ``set_alpha_to_one``).
        timestep_spacing: where a sampler with few steps puts its timesteps (arXiv 2305.08891, table 2).
        steps_offset: added to timesteps of "leading" spacing; 1 for Stable Diffusion.
        stride_destinations: a move ends ``T // num_steps`` timesteps below its start, as DDIM as published has it;
            otherwise at the next timestep of the grid, as Euler's sampler has it. They differ only when the number of
            steps does not divide T, or with "linspace".
        clip_range: bound on predicted clean latents while sampling; None for latent models.
        scales_noise: sampling begins at ``sigma * noise`` rather than at noise, as Euler's does with spacings that
            start at the last timestep; only without ``stride_destinations``.

    Raises:
        UserError: for contradictory settings.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction_type: PredictionType = "epsilon",
        *,
        clean_alpha_to_one: bool = False,
        timestep_spacing: Spacing = "leading",
        steps_offset: int = 0,
        stride_destinations: bool = True,
        clip_range: float | None = None,
        scales_noise: bool = False,
    ) -> None:
        super().__init__(prediction_type, len(alphas_cumprod), clip_range, "uniform")
        if prediction_type == "flow":
            raise UserError("a discrete process cannot predict flow: give epsilon, v_prediction or sample")
        if timestep_spacing not in get_args(Spacing):
            raise unknown("timestep spacing", timestep_spacing, get_args(Spacing))
        if prediction_type == "epsilon" and bool(alphas_cumprod[-1] == 0):
            raise UserError(
                "a schedule with zero terminal SNR cannot predict epsilon, since the last timestep holds no image to "
                "recover: give prediction_type v_prediction, or rescale_betas_zero_snr false"
            )
        self.clean_alpha_to_one = clean_alpha_to_one
        self.timestep_spacing = timestep_spacing
        self.steps_offset = steps_offset
        self.stride_destinations = stride_destinations
        self.scales_noise = scales_noise and timestep_spacing != "leading"
        # Float64 holds the float32 table exactly and spares later roots and differences their rounding.
        abar = alphas_cumprod.detach().cpu().double()
        self._tables = {torch.device("cpu"): Level(abar.sqrt(), (1 - abar).sqrt())}

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any], conventions: Conventions = DDIM) -> DiscreteProcess:
        """Read a scheduler's config as diffusers does.

        Args:
            config: keys of the scheduler's ``scheduler_config.json``; absent ones take the class's defaults.
            conventions: how that scheduler class reads it.

        Raises:
            UserError: for unknown schedules, and for dynamic thresholding, which latent models have no use for.
        """
        if config.get("thresholding"):
            raise UserError(
                "the scheduler config asks for dynamic thresholding, which is made for pixels: set it false"
            )
        clips = conventions.clips is not None and config.get("clip_sample", conventions.clips)
        to_one = conventions.clean_to_one is None or config.get("set_alpha_to_one", conventions.clean_to_one)
        return cls(
            _alphas_from_config(config, conventions),
            config.get("prediction_type", "epsilon"),
            clean_alpha_to_one=bool(to_one),
            timestep_spacing=config.get("timestep_spacing", conventions.spacing),
            steps_offset=config.get("steps_offset", 0),
            stride_destinations=conventions.strides,
            scales_noise=conventions.scales_noise,
            clip_range=float(config.get("clip_sample_range", 1.0)) if clips else None,
        )

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float64 abar."""
        return self._tables[torch.device("cpu")].alpha.square()

    def level(self, timesteps: Tensor) -> Level:
        if timesteps.is_floating_point():
            raise ValueError(f"a discrete process takes integer timesteps, not {timesteps.dtype}")
        if timesteps.device.type == "cpu" and timesteps.numel():
            least, most = timesteps.aminmax()
            if least < 0 or most >= self.num_train_timesteps:
                raise ValueError(f"timesteps span {least} .. {most}: expected 0 .. {self.num_train_timesteps - 1}")
        return self._table(timesteps.device).select(timesteps.long())

    def clean_level(self, rows: int = 1, device: torch.device | None = None) -> Level:
        first = self._table(device or torch.device("cpu")).select(slice(0, 1))
        if self.clean_alpha_to_one:
            first = Level(torch.ones_like(first.alpha), torch.zeros_like(first.sigma))
        return first.repeat(rows)

    def inversion_start(self, rows: int = 1, device: torch.device | None = None) -> Level:
        # A predicted image says nothing about the noise in latents without any.
        if self.prediction_type == "sample":
            return self._table(device or torch.device("cpu")).select(slice(0, 1)).repeat(rows)
        return self.clean_level(rows, device)

    def timestep_at(self, index: Tensor) -> Tensor:
        return index

    def partway(self, timesteps: Tensor, fraction: Tensor) -> Tensor:
        return (timesteps * fraction.double()).round().long()

    def sampling_grid(self, num_steps: int) -> Grid:
        timesteps = self._spaced(num_steps)
        if int(timesteps[0]) >= self.num_train_timesteps:
            raise UserError(
                f"{num_steps} steps with an offset of {self.steps_offset} begin at timestep {int(timesteps[0])}, "
                f"beyond the last one, {self.num_train_timesteps - 1}: take fewer steps"
            )
        sources = self.level(timesteps)
        if not self.stride_destinations:
            destinations = Level.cat([sources.select(slice(1, None)), self.clean_level()])
            return Grid(timesteps, sources, destinations, float(sources.sigma[0]) if self.scales_noise else 1.0)
        return Grid(timesteps, sources, self.level_or_clean(timesteps - self.num_train_timesteps // num_steps))

    def level_or_clean(self, timesteps: Tensor) -> Level:
        """Return the level of each timestep, the clean one for negative timesteps."""
        inside, clean = self.level(timesteps.clamp(min=0)), self.clean_level(len(timesteps), timesteps.device)
        return Level(*(torch.where(timesteps < 0, c, i) for c, i in zip(clean, inside, strict=True)))

    def _spaced(self, num_steps: int) -> Tensor:
        """Descending timesteps (n,) in the process's spacing."""
        total = self.num_train_timesteps
        check_steps(num_steps, total)
        if self.timestep_spacing == "linspace":
            return torch.linspace(0, total - 1, num_steps, dtype=torch.float64).round().long().flip(0)
        if self.timestep_spacing == "leading":
            return (torch.arange(num_steps) * (total // num_steps)).flip(0) + self.steps_offset
        return torch.arange(total, 0, -total / num_steps, dtype=torch.float64).round().long() - 1

    def _table(self, device: torch.device) -> Level:
        """Roots for every timestep on a device; copied there once, for a copy in every step would stall it."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]


def _alphas_from_config(config: Mapping[str, Any], conventions: Conventions) -> Tensor:
    """Build the abar (T,) that a scheduler config describes."""
    schedule, start, end = conventions.betas
    betas = config.get("trained_betas")
    if betas is None:
        betas = make_betas(
            config.get("beta_schedule", schedule),
            config.get("num_train_timesteps", 1000),
            config.get("beta_start", start),
            config.get("beta_end", end),
        )
    zero_snr = bool(config.get("rescale_betas_zero_snr", False))
    if conventions.snr_shift is None:
        return cumulative_alphas(betas, zero_terminal_snr=zero_snr)
    shifted = shift_snr(cumulative_alphas(betas), config.get("snr_shift_scale", conventions.snr_shift))
    return rescale_to_zero_snr(shifted) if zero_snr else shifted

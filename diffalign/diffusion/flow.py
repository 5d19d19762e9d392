"""Rectified flow over continuous levels: SD3, FLUX, Sana, Wan, LTX."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffalign.diffusion.base import NoiseProcess, check_steps
from diffalign.diffusion.level import Grid, Level, exact_dtype
from diffalign.errors import UserError, unknown

SigmaSpacing = Literal["table", "uniform", "solver"]
_UNSUPPORTED = (
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)


@dataclass(frozen=True)
class DynamicShift:
    """Shift that grows with the number of image tokens (FLUX); field names and defaults are diffusers'.

    Args:
        base_shift, max_shift: mu at the least and at the largest number of tokens.
        base_image_seq_len, max_image_seq_len: those numbers of tokens.
        time_shift_type: "exponential" ``e^mu / (e^mu + 1/s - 1)`` or "linear" ``mu / (mu + 1/s - 1)``.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: Literal["exponential", "linear"] = "exponential"

    def mu(self, image_tokens: int) -> float:
        """Return mu for a number of image tokens, on the line through both ends."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return self.base_shift + slope * (image_tokens - self.base_image_seq_len)

    def factor(self, image_tokens: int) -> float:
        """Return the shift that stands for mu."""
        mu = self.mu(image_tokens)
        return math.exp(mu) if self.time_shift_type == "exponential" else mu


class FlowProcess(NoiseProcess):
    """``alpha = 1 - s``, ``sigma = s`` for s in [0, 1]; the timestep is ``T s`` and the network predicts noise - image.

    Example::

        process = FlowProcess(shift=3.0)
        timesteps = process.sample_timesteps(4, torch.Generator().manual_seed(0))   # 1000 * sigma, logit-normal
        velocity = process.target(latents, noise, timesteps)

    Args:
        shift: moves levels towards noise, ``shift s / (1 + (shift - 1) s)``, in training and in sampling; 3 for SD3.
        num_train_timesteps: T.
        sigma_spacing: levels of a sampler before the shift, by the pipeline that samples:
            "table" from the largest to the smallest level of the shifted training table (SD3, which thus shifts twice),
            "uniform" from 1 to ``1 / num_steps`` (FLUX, LTX), or
            "solver" from 1 towards ``1 / T``, with neither end doubled (Wan, Sana).
        dynamic_shift: resolution-dependent shift of the sampling levels; ``shift`` is then unused, as in diffusers.
        shift_terminal: stretch the sampling levels so that the last one is this (LTX); None to leave them.
    """

    def __init__(
        self,
        shift: float = 1.0,
        num_train_timesteps: int = 1000,
        *,
        sigma_spacing: SigmaSpacing = "table",
        dynamic_shift: DynamicShift | None = None,
        shift_terminal: float | None = None,
    ) -> None:
        super().__init__("flow", num_train_timesteps, None, "logit_normal")
        if sigma_spacing not in get_args(SigmaSpacing):
            raise unknown("sigma spacing", sigma_spacing, get_args(SigmaSpacing))
        if shift <= 0:
            raise UserError(f"shift is {shift}: expected a positive number, 1 for none")
        self.shift = shift
        self.sigma_spacing = sigma_spacing
        self.dynamic_shift = dynamic_shift
        self.shift_terminal = shift_terminal
        self._sampling_shift = None if dynamic_shift else shift

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any], sigma_spacing: SigmaSpacing | None = None) -> FlowProcess:
        """Read a scheduler's config as diffusers does.

        Args:
            config: keys of ``scheduler_config.json``, of a flow-matching scheduler or of a solver with flow sigmas.
            sigma_spacing: how the model's pipeline spaces levels; by default "solver" for solvers, "uniform" where the
                shift is dynamic, else "table".

        Raises:
            UserError: for options that change the sampler in ways this process does not follow.
        """
        odd = [key for key in _UNSUPPORTED if config.get(key)]
        if odd:
            raise UserError(
                f"the scheduler config sets {', '.join(odd)}, which flow sampling here has not: set it false"
            )
        solver = bool(config.get("use_flow_sigmas"))
        dynamic = None
        if config.get("use_dynamic_shifting"):
            given = {field.name: config[field.name] for field in fields(DynamicShift) if field.name in config}
            dynamic = DynamicShift(**given)
        return cls(
            shift=config.get("flow_shift" if solver else "shift", 1.0),
            num_train_timesteps=config.get("num_train_timesteps", 1000),
            sigma_spacing=sigma_spacing or ("solver" if solver else "uniform" if dynamic else "table"),
            dynamic_shift=dynamic,
            shift_terminal=config.get("shift_terminal"),
        )

    def at_resolution(self, image_tokens: int) -> FlowProcess:
        """Return the process for a number of image tokens; the same process unless its shift is dynamic."""
        if self.dynamic_shift is None:
            return self
        process = copy.copy(self)
        process._sampling_shift = self.dynamic_shift.factor(image_tokens)
        return process

    def level(self, timesteps: Tensor) -> Level:
        if not timesteps.is_floating_point():
            raise ValueError(f"a flow process takes floating-point timesteps T * sigma, not {timesteps.dtype}")
        sigma = timesteps.to(exact_dtype(timesteps.device)) / self.num_train_timesteps
        if sigma.device.type == "cpu" and sigma.numel():
            least, most = sigma.aminmax()
            if least < 0 or most > 1 + 1e-6:
                raise ValueError(
                    f"levels span {least} .. {most}: expected timesteps in 0 .. {self.num_train_timesteps}"
                )
        return Level(1 - sigma, sigma)

    def clean_level(self, rows: int = 1, device: torch.device | None = None) -> Level:
        return Level(torch.ones(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)).to(
            device or torch.device("cpu")
        )

    def timestep_at(self, index: Tensor) -> Tensor:
        """Return ``T sigma`` of the training table, float32; a dynamic shift does not act on it (as in diffusers)."""
        sigma = (index + 1).float() / self.num_train_timesteps
        if self.dynamic_shift is None:
            sigma = _shifted(sigma, self.shift)
        return sigma * self.num_train_timesteps

    def partway(self, timesteps: Tensor, fraction: Tensor) -> Tensor:
        return timesteps * fraction.to(timesteps.dtype)

    def sampling_grid(self, num_steps: int) -> Grid:
        sigma = self.sampling_sigmas(num_steps)
        timesteps = (sigma * self.num_train_timesteps).float()
        sigma = torch.cat([sigma, torch.zeros(1)])
        levels = Level(1 - sigma, sigma)
        return Grid(timesteps, levels.select(slice(None, -1)), levels.select(slice(1, None)))

    def sampling_sigmas(self, num_steps: int) -> Tensor:
        """Return the sampler's levels (n,) in descending order, float64, without the final zero."""
        check_steps(num_steps, self.num_train_timesteps)
        if self._sampling_shift is None:
            raise UserError(
                "the shift of this process depends on the image size: ask process.at_resolution(image_tokens)"
            )
        sigma = _shifted(self._unshifted(num_steps), self._sampling_shift)
        if self.shift_terminal is not None:
            rest = 1 - sigma
            sigma = 1 - rest * (1 - self.shift_terminal) / rest[-1]
        return sigma

    def _unshifted(self, num_steps: int) -> Tensor:
        total = self.num_train_timesteps
        if self.sigma_spacing == "uniform":
            return torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)
        if self.sigma_spacing == "solver":
            return torch.linspace(1, 1 / total, num_steps + 1, dtype=torch.float64)[:-1]
        ends = self.timestep_at(torch.tensor([total - 1, 0])).double() / total
        return torch.linspace(float(ends[0]), float(ends[1]), num_steps, dtype=torch.float64)


def _shifted(sigma: Tensor, shift: float) -> Tensor:
    """Move levels towards noise; a shift of 1 leaves them."""
    return shift * sigma / (1 + (shift - 1) * sigma)

"""What strategies and samplers ask of a noise process; discrete and flow processes fill in the levels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from diffalign.diffusion.level import Grid, Level
from diffalign.diffusion.parameterization import PARAMETERIZATIONS, PredictionType
from diffalign.diffusion.timesteps import Distribution, draw_indices
from diffalign.errors import UserError, unknown


class NoiseProcess(ABC):
    """Relates clean latents, noise, noisy latents and predictions at any noise level.

    All methods are pure and row-wise. They compute in float32, or in float64 if a tensor they are given is float64, and
    return that type: half-precision latents come back as float32, for the policy to cast.

    Args:
        prediction_type: what the network predicts.
        num_train_timesteps: T, the number of timesteps the network was trained on.
        clip_range: bound on the magnitude of predicted clean latents while sampling; None for no bound.
        distribution: how :meth:`sample_timesteps` draws by default.
    """

    def __init__(
        self,
        prediction_type: PredictionType,
        num_train_timesteps: int,
        clip_range: float | None,
        distribution: Distribution,
    ) -> None:
        if prediction_type not in PARAMETERIZATIONS:
            raise unknown("prediction type", prediction_type, get_args(PredictionType))
        self.prediction_type: PredictionType = prediction_type
        self.num_train_timesteps = num_train_timesteps
        self.clip_range = clip_range
        self.distribution: Distribution = distribution
        self._convert = PARAMETERIZATIONS[prediction_type]

    @abstractmethod
    def level(self, timesteps: Tensor) -> Level:
        """Return the level of each timestep.

        Args:
            timesteps: (rows,) model-facing timesteps: integers 0 .. T-1 for a discrete process, ``T * sigma`` for flow.

        Raises:
            ValueError: if timesteps are not of the process's kind, or (checked on the CPU only) out of range.
        """

    @abstractmethod
    def clean_level(self, rows: int = 1, device: torch.device | None = None) -> Level:
        """Return the level that sampling ends at and inversion starts from, for a number of rows."""

    def inversion_start(self, rows: int = 1, device: torch.device | None = None) -> Level:
        """Return the level that an inversion takes clean latents to be at: the clean one wherever that is possible."""
        return self.clean_level(rows, device)

    @abstractmethod
    def timestep_at(self, index: Tensor) -> Tensor:
        """Return the training timestep of each index (rows,) in 0 .. T-1; noise grows with the index."""

    @abstractmethod
    def partway(self, timesteps: Tensor, fraction: Tensor) -> Tensor:
        """Return the timestep at a fraction (rows,) of the way from clean latents to ``timesteps`` (rows,)."""

    @abstractmethod
    def sampling_grid(self, num_steps: int) -> Grid:
        """Return the moves of the deterministic sampler, exactly as diffusers' scheduler of this process makes them.

        Raises:
            UserError: if the number of steps does not fit the process.
        """

    def at_resolution(self, image_tokens: int) -> NoiseProcess:
        """Return the process for images of a number of tokens: this one, unless its sampler depends on it."""
        return self

    def grid_through(self, timesteps: Sequence[float] | Tensor) -> Grid:
        """Return the moves through given descending timesteps, ending at exactly no noise (few-step, distilled models).

        Args:
            timesteps: (n,) model-facing timesteps.
        """
        kind = self.timestep_at(torch.zeros(1, dtype=torch.long)).dtype
        points = torch.as_tensor(timesteps).to(kind)
        sources = self.level(points)
        end = Level(torch.ones_like(sources.alpha[:1]), torch.zeros_like(sources.sigma[:1]))
        return Grid(points, sources, Level.cat([sources.select(slice(1, None)), end]))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return noisy latents ``alpha * latents + sigma * noise``, shaped as ``latents`` (rows, channels, ...)."""
        latents, noise = _widen(latents, noise)
        at = self.level(timesteps).like(latents)
        return at.alpha * latents + at.sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the network should predict for these latents and this noise, shaped as ``latents``."""
        return self.from_x0_epsilon(latents, noise, self.level(timesteps))

    def from_x0_epsilon(self, x0: Tensor, epsilon: Tensor, level: Level) -> Tensor:
        """Return the prediction that stands for clean latents ``x0`` and noise ``epsilon`` at a level."""
        x0, epsilon = _widen(x0, epsilon)
        return self._convert.prediction(x0, epsilon, level.like(x0))

    def to_x0(self, prediction: Tensor, noisy: Tensor, level: Level) -> Tensor:
        """Return the clean latents that a prediction at ``noisy`` (rows, channels, ...) stands for; never clipped."""
        prediction, noisy = _widen(prediction, noisy)
        return self._convert.x0(prediction, noisy, level.like(noisy))

    def to_epsilon(self, prediction: Tensor, noisy: Tensor, level: Level) -> Tensor:
        """Return the noise that a prediction at ``noisy`` (rows, channels, ...) stands for."""
        prediction, noisy = _widen(prediction, noisy)
        return self._convert.epsilon(prediction, noisy, level.like(noisy))

    def noise_from(self, noisy: Tensor, latents: Tensor, level: Level) -> Tensor:
        """Return the noise that leads from ``latents`` to ``noisy`` at a level (sigma > 0)."""
        noisy, latents = _widen(noisy, latents)
        at = level.like(noisy)
        return (noisy - at.alpha * latents) / at.sigma

    def move(self, prediction: Tensor, noisy: Tensor, source: Level, destination: Level, clip: bool = False) -> Tensor:
        """Move latents along the deterministic path between two levels, in either direction.

        DDIM with eta 0 (arXiv 2010.02502, eq. 12) and Euler's rule for flow are this one formula:
        ``alpha' x0 + sigma' eps`` with x0 and eps taken from the prediction at the source.

        Args:
            prediction: (rows, channels, ...) the network's output.
            noisy: (rows, channels, ...) latents at ``source``.
            source, destination: (rows,) or (1,) levels.
            clip: bound the predicted clean latents by ``clip_range``, as samplers do, and inversions
                only where asked to.
        """
        x0 = self.to_x0(prediction, noisy, source)
        epsilon = self.to_epsilon(prediction, noisy, source)
        if clip:
            x0 = self.clip(x0)
        at = destination.like(x0)
        return at.alpha * x0 + at.sigma * epsilon

    def backtrack(
        self, prediction: Tensor, estimate: Tensor, source: Level, reached: Tensor, destination: Level
    ) -> Tensor:
        """Return where a move must have started from, given a prediction made for an estimate of that start.

        Iterating ``estimate <- backtrack(predict(estimate), estimate, ...)`` inverts :meth:`move` exactly once it
        converges (fixed-point inversion).

        Args:
            prediction: (rows, channels, ...) the network's output for ``estimate``.
            estimate: (rows, channels, ...) latents thought to be at ``source``.
            source: (rows,) or (1,) levels, the noisier ones.
            reached: (rows, channels, ...) latents at ``destination``.
            destination: (rows,) or (1,) levels with alpha > 0.
        """
        prediction, reached = _widen(prediction, reached)
        estimate, reached = _widen(estimate, reached)
        return self._convert.backtrack(prediction, estimate, source.like(reached), reached, destination.like(reached))

    def clip(self, x0: Tensor) -> Tensor:
        """Bound predicted clean latents as the sampler of this process does; the identity for latent models."""
        return x0 if self.clip_range is None else x0.clamp(-self.clip_range, self.clip_range)

    def x0_gain(self, level: Level) -> Tensor:
        """Return how much an error of the prediction becomes in the clean latents, (rows,)."""
        return self._convert.x0_gain(level)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Return the signal-to-noise ratio ``alpha^2 / sigma^2`` of each timestep, (rows,)."""
        at = self.level(timesteps)
        return (at.alpha / at.sigma).square()

    def sample_timesteps(
        self,
        rows: int,
        generator: torch.Generator,
        *,
        low: int = 0,
        high: int | None = None,
        distribution: Distribution | None = None,
    ) -> Tensor:
        """Draw training timesteps, (rows,), on the generator's device.

        Args:
            rows: how many.
            generator: source of randomness.
            low, high: half-open range of indices in 0 .. T, noise growing with the index; by default all.
            distribution: "uniform" or "logit_normal" over the range; by default the process's own.

        Raises:
            UserError: if the range is empty or leaves 0 .. T.
        """
        high = self.num_train_timesteps if high is None else high
        if not 0 <= low < high <= self.num_train_timesteps:
            raise UserError(
                f"timesteps cannot be drawn from [{low}, {high}): "
                f"give a non-empty range within [0, {self.num_train_timesteps})"
            )
        return self.timestep_at(draw_indices(rows, generator, low, high, distribution or self.distribution))


def check_steps(num_steps: int, limit: int) -> None:
    """Refuse a number of sampling or inversion steps outside 1 .. limit."""
    if not 1 <= num_steps <= limit:
        raise UserError(f"the number of steps is {num_steps}: expected 1 to {limit}, the timesteps of training")


def _widen(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Bring two tensors to their common type, float32 at least."""
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    return first.to(dtype), second.to(dtype)

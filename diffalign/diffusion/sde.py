"""Stochastic sampling steps as Gaussian policies: mean, deviation and log-probability of every transition.

Steps take explicit levels. Two families, one interface:

* DDIM with eta > 0 (arXiv 2010.02502, eq. 12 and 16; log-probabilities as in DDPO, arXiv 2305.13301);
* the rectified-flow SDE of Flow-GRPO (arXiv 2505.05470) and DanceGRPO (arXiv 2505.07818), one formula with noise
  level ``g``: ``mu = x (1 + g^2 dt / (2 s)) + v (1 + g^2 (1 - s) / (2 s)) dt``, deviation ``g sqrt(-dt)``.

Log-probabilities are means over the elements of a row, never sums: every published clipping range depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.diffusion.base import NoiseProcess
from diffalign.diffusion.discrete import DiscreteProcess
from diffalign.diffusion.level import Grid, Level
from diffalign.errors import UserError

StepNoise = Callable[[int], Tensor]
"""Index of a move -> standard normal noise (rows, channels, ...)."""


@dataclass(frozen=True)
class Transition:
    """The distribution of the latents after one step.

    Args:
        mean: (rows, channels, ...) float32 or float64.
        std: (rows,) or (1,) deviation, the same for all elements of a row.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return the latents that standard normal noise (rows, channels, ...) leads to."""
        return self.mean + self._std * noise

    def log_prob(self, latents: Tensor) -> Tensor:
        """Return the log-density of given latents, (rows,), the MEAN over their elements.

        The latents are constants: gradients reach the mean alone.
        """
        std = self._std
        squared = (latents.detach().to(self.mean) - self.mean).square()
        density = -squared / (2 * std.square()) - std.log() - 0.5 * math.log(2 * math.pi)
        return density.flatten(1).mean(1)

    @property
    def _std(self) -> Tensor:
        return self.std.to(self.mean).reshape(-1, *[1] * (self.mean.dim() - 1))


def ddim_std(source: Level, destination: Level, eta: float) -> Tensor:
    """Return DDIM's deviation of a step towards the image, (rows,); with eta 1 that of the DDPM posterior.

    ``eta * (sigma' / sigma) * sqrt(sigma^2 - (alpha / alpha')^2 sigma'^2)``, which for variance-preserving levels is
    ``eta * sqrt((1 - abar') / (1 - abar) * (1 - abar / abar'))``.

    Args:
        source: the noisier levels.
        destination: the cleaner levels.
        eta: share of the randomness, 0 .. 1.
    """
    kept = (source.alpha / destination.alpha * destination.sigma).square()
    added = (source.sigma.square() - kept).clamp(min=0)
    return eta * destination.sigma / source.sigma * added.sqrt()


def ddim_transition(
    process: NoiseProcess, prediction: Tensor, noisy: Tensor, source: Level, destination: Level, eta: float
) -> Transition:
    """Return the DDIM step with randomness.

    As in the published code, the predicted image is clipped where the process clips, the predicted noise is not derived
    again from it.

    Args:
        process: the noise process.
        prediction: (rows, channels, ...) the network's output.
        noisy: (rows, channels, ...) latents at ``source``.
        source, destination: (rows,) or (1,) levels, the destination less noisy but not without noise.
        eta: share of the randomness, above 0.

    Raises:
        UserError: for ``eta <= 0``, where no density exists.
    """
    if eta <= 0:
        raise UserError(f"a DDIM step with eta {eta} has no log-probability: give eta above 0 (1 in DDPO)")
    x0 = process.clip(process.to_x0(prediction, noisy, source))
    epsilon = process.to_epsilon(prediction, noisy, source)
    std = ddim_std(source, destination, eta)
    rest = (destination.sigma.square() - std.square()).clamp(min=0).sqrt()
    towards = Level(destination.alpha, rest).like(x0)
    return Transition(towards.alpha * x0 + towards.sigma * epsilon, std)


def flow_transition(
    velocity: Tensor, noisy: Tensor, source: Level, destination: Level, noise_level: Tensor | float
) -> Transition:
    """Return the step of the rectified-flow SDE that has the marginals of the deterministic sampler.

    Args:
        velocity: (rows, channels, ...) the network's output, noise - image.
        noisy: (rows, channels, ...) latents at ``source``.
        source, destination: (rows,) or (1,) levels, the destination less noisy.
        noise_level: g, (rows,), (1,) or one number: constant in DanceGRPO (0.3), :func:`growing_noise_level` in
            Flow-GRPO. 0 gives Euler's step as the mean, without density.
    """
    dtype = torch.promote_types(torch.promote_types(velocity.dtype, noisy.dtype), torch.float32)
    velocity, noisy = velocity.to(dtype), noisy.to(dtype)
    level = torch.as_tensor(noise_level, dtype=dtype, device=noisy.device).reshape(-1)
    at, to = source.like(noisy), destination.like(noisy)
    step = to.sigma - at.sigma
    pull = level.reshape(-1, *[1] * (noisy.dim() - 1)).square() / (2 * at.sigma)
    mean = noisy * (1 + pull * step) + velocity * (1 + pull * at.alpha) * step
    return Transition(mean, level * (-step).flatten().sqrt())


def growing_noise_level(sigma: Tensor, second_sigma: Tensor, scale: float = 0.7) -> Tensor:
    """Return ``scale * sqrt(s / (1 - s))``, which grows with the noise in the image: Flow-GRPO's noise level, (rows,).

    Args:
        sigma: (rows,) levels that steps start from.
        second_sigma: second level of the sampler; it stands for s in ``1 - s`` where s is 1 and the root would diverge.
        scale: 0.7 in the paper and in the released configs.
    """
    return scale * (sigma / (1 - torch.where(sigma == 1, second_sigma, sigma))).sqrt()


def gaussian_kl(mean: Tensor, other_mean: Tensor, std: Tensor) -> Tensor:
    """Return the divergence of two Gaussians of one deviation, (rows,), the MEAN over elements.

    Args:
        mean, other_mean: (rows, channels, ...).
        std: (rows,) or (1,).
    """
    return (mean - other_mean).square().flatten(1).mean(1) / (2 * std.to(mean).square())


def normalised_log_ratio(log_ratio: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """Return log-ratios without their negative bias and of one spread over all steps, (rows,).

    ``s (log r + mean (mu - mu_old)^2 / (2 s^2))``; the policy loss is then divided by the step's ``-dt`` by the caller.

    As in the released code of Pref-GRPO, arXiv 2508.20751.

    Args:
        log_ratio: (rows,) with a graph.
        mean, old_mean: (rows, channels, ...) means of the transition now and at sampling.
        std: (rows,) or (1,) deviation s of the transition.
    """
    return (log_ratio + gaussian_kl(mean, old_mean, std)) * std.to(log_ratio)


def noisy_destinations(timesteps: Tensor, num_train_timesteps: int, num_steps: int) -> Tensor:
    """Return where DDPO's code sends each step of a discrete process: one stride down, never below timestep 0, (rows,).

    Timestep 0 still holds some noise, clean latents hold none, and a step to them would have no density.
    """
    return (timesteps - num_train_timesteps // num_steps).clamp(min=0)


def stochastic_grid(process: NoiseProcess, num_steps: int) -> Grid:
    """Return the sampler's moves for steps with randomness; those of a discrete process always keep some noise.

    A step that starts from timestep 0 would have no randomness and hence no density; it is left out.
    """
    grid = process.sampling_grid(num_steps)
    if not isinstance(process, DiscreteProcess):
        return grid
    timesteps = grid.timesteps[grid.timesteps > 0]
    destinations = noisy_destinations(timesteps, process.num_train_timesteps, num_steps)
    return Grid(timesteps, process.level(timesteps), process.level(destinations), grid.noise_scale)

"""Noise schedules of discrete processes, to the last bit as diffusers builds them (in float32)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffalign.errors import unknown


def make_betas(
    schedule: str = "linear", num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02
) -> Tensor:
    """Build a schedule by its name in diffusers.

    Args:
        schedule: "linear", "scaled_linear", "squaredcos_cap_v2" or "sigmoid".
        num_train_timesteps: T.
        beta_start, beta_end: ends of the schedule; the cosine schedule has none.

    Returns:
        (T,) float32 betas.

    Raises:
        UserError: for an unknown name.
    """
    steps = num_train_timesteps
    if schedule == "linear":
        return torch.linspace(beta_start, beta_end, steps, dtype=torch.float32)
    if schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float32).square()
    if schedule == "squaredcos_cap_v2":
        return _cosine_betas(steps)
    if schedule == "sigmoid":
        return torch.linspace(-6, 6, steps).sigmoid() * (beta_end - beta_start) + beta_start
    raise unknown("beta schedule", schedule, ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])


def _cosine_betas(steps: int, largest: float = 0.999) -> Tensor:
    """Betas whose cumulative product follows a squared cosine (arXiv 2102.09672, eq. 17), none above ``largest``."""
    curve = [math.cos((step / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(steps + 1)]
    betas = [min(1 - after / before, largest) for before, after in pairwise(curve)]
    return torch.tensor(betas, dtype=torch.float32)


def cumulative_alphas(betas: Tensor | Sequence[float], *, zero_terminal_snr: bool = False) -> Tensor:
    """Return the cumulative product of ``1 - beta``, (T,) float32.

    Args:
        betas: (T,).
        zero_terminal_snr: rescale so that nothing of the image is left at the last timestep (arXiv 2305.08891, alg. 1).
    """
    betas = torch.as_tensor(betas, dtype=torch.float32)
    products = (1 - betas).cumprod(0)
    if not zero_terminal_snr:
        return products
    rescaled = rescale_to_zero_snr(products)
    # The round trip through betas is diffusers' own and costs the last bit; we follow it to agree exactly.
    factors = torch.cat([rescaled[:1], rescaled[1:] / rescaled[:-1]])
    return (1 - (1 - factors)).cumprod(0)


def rescale_to_zero_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and stretch ``sqrt(alphas_cumprod)`` so that its last value is 0 and its first stays."""
    roots = alphas_cumprod.sqrt()
    first, last = roots[0], roots[-1]
    return ((roots - last) * (first / (first - last))).square()


def shift_snr(alphas_cumprod: Tensor, scale: float) -> Tensor:
    """Divide the signal-to-noise ratio by ``scale``, as CogVideoX does (arXiv 2408.06072)."""
    return alphas_cumprod / (scale + (1 - scale) * alphas_cumprod)

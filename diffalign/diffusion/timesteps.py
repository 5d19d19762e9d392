"""Which timesteps training visits."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from diffalign.errors import unknown

Distribution = Literal["uniform", "logit_normal"]


def draw_indices(
    rows: int, generator: torch.Generator, low: int, high: int, distribution: Distribution = "uniform"
) -> Tensor:
    """Draw timestep indices in ``low .. high - 1``, (rows,) int64, on the generator's device; noise grows with them.

    Args:
        rows: how many.
        generator: source of randomness.
        low, high: half-open range.
        distribution: "uniform", or "logit_normal" as SD3 trains with (arXiv 2403.03206, mean 0, deviation 1).
    """
    device = generator.device
    if distribution == "uniform":
        return torch.randint(low, high, (rows,), generator=generator, device=device)
    if distribution == "logit_normal":
        return indices_at(torch.randn(rows, generator=generator, device=device).sigmoid(), low, high)
    raise unknown("timestep distribution", distribution, get_args(Distribution))


def indices_at(u: Tensor, low: int, high: int) -> Tensor:
    """Return the timestep index at each position ``u`` (rows,) in [0, 1) of a range, counted from its noisiest end.

    This is how the published SD3 scripts read the scheduler's descending table: ``table[int(u * 1000)]``.
    """
    size = high - low
    return high - 1 - (u * size).long().clamp(0, size - 1)


def few_step_timesteps(timesteps: Tensor, num_train_timesteps: int = 1000, num_steps: int = 4) -> Tensor:
    """Map uniform integer timesteps (rows,) onto those a distilled few-step model was trained on.

    SD-Turbo and SDXL-Turbo know only 249, 499, 749 and 999 (official Diffusion-DPO script, ``is_turbo``): the draw
    modulo the number of steps says which.
    """
    stride = num_train_timesteps // num_steps
    return stride * (timesteps % num_steps) + stride - 1

"""Weights of squared denoising errors by noise level."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from diffalign.diffusion.base import NoiseProcess
from diffalign.errors import unknown

Weighting = Literal["constant", "epsilon", "x0", "min_snr"]


def error_weights(
    process: NoiseProcess, timesteps: Tensor, weighting: Weighting = "constant", gamma: float = 5.0
) -> Tensor:
    """Return the weight of each row's squared prediction error, (rows,).

    Args:
        process: the noise process; its prediction type decides what an error means.
        timesteps: (rows,) model-facing timesteps.
        weighting: "constant" 1; "epsilon" makes it the error of the noise, ``(1 - s)^2`` for flow; "x0" the error of
            the clean latents; "min_snr" the latter times ``min(snr, gamma)`` (arXiv 2303.09556).
        gamma: bound of "min_snr"; 5 in the paper.

    Raises:
        UserError: for an unknown name.
    """
    level = process.level(timesteps)
    x0_weight = process.x0_gain(level).square()
    if weighting == "constant":
        return torch.ones_like(x0_weight)
    if weighting == "x0":
        return x0_weight
    if weighting == "epsilon":
        return x0_weight * process.snr(timesteps)
    if weighting == "min_snr":
        return x0_weight * process.snr(timesteps).clamp(max=gamma)
    raise unknown("weighting", weighting, get_args(Weighting))

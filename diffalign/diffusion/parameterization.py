"""What a network predicts, in terms of clean latents and noise.

One entry for each prediction type; nothing else in the package knows their formulas. With ``x = alpha x0 + sigma eps``
a network's output ``o`` is::

    epsilon        o = eps                        any alpha > 0
    sample         o = x0                         any sigma > 0
    v_prediction   o = alpha eps - sigma x0       alpha^2 + sigma^2 = 1 (Salimans and Ho, arXiv 2202.00512)
    flow           o = eps - x0                   alpha + sigma = 1 (rectified flow, arXiv 2209.03003)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffalign.diffusion.level import Level

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
Convert = Callable[[Tensor, Tensor, Level], Tensor]
Backtrack = Callable[[Tensor, Tensor, Level, Tensor, Level], Tensor]


def _along_noise(epsilon: Tensor, at: Level, reached: Tensor, to: Level) -> Tensor:
    """Latents at ``at`` from which a move that keeps this noise leads to ``reached``."""
    return at.alpha * (reached - to.sigma * epsilon) / to.alpha + at.sigma * epsilon


def _along_velocity(v: Tensor, at: Level, reached: Tensor, to: Level) -> Tensor:
    """The same for a velocity: the move turns (image, noise) by an angle, so this turns back; alpha may be 0."""
    sine = to.alpha * at.sigma - to.sigma * at.alpha
    cosine = to.alpha * at.alpha + to.sigma * at.sigma
    return (reached + sine * v) / cosine


class Parameterization(NamedTuple):
    """Conversions of one prediction type; levels are shaped to broadcast.

    Args:
        x0: (prediction, noisy, level) -> clean latents.
        epsilon: (prediction, noisy, level) -> noise.
        prediction: (x0, epsilon, level) -> prediction.
        backtrack: (prediction, estimate, at, reached, to) -> latents at ``at`` from which the deterministic move with
            this prediction, made for an ``estimate`` of them, leads to ``reached`` at ``to``. Its fixed point in the
            estimate inverts the move. A predicted image is turned into noise first: used directly, its error would grow
            by ``sigma / sigma'`` on the first moves.
        x0_gain: level -> how much an error of the prediction becomes in x0; errors of the noise are ``alpha / sigma``
            times those of x0.
    """

    x0: Convert
    epsilon: Convert
    prediction: Convert
    backtrack: Backtrack
    x0_gain: Callable[[Level], Tensor]


PARAMETERIZATIONS: dict[PredictionType, Parameterization] = {
    "epsilon": Parameterization(
        x0=lambda o, x, at: (x - at.sigma * o) / at.alpha,
        epsilon=lambda o, x, at: o,
        prediction=lambda x0, epsilon, at: epsilon,
        backtrack=lambda o, z, at, x, to: _along_noise(o, at, x, to),
        x0_gain=lambda at: at.sigma / at.alpha,
    ),
    "sample": Parameterization(
        x0=lambda o, x, at: o,
        epsilon=lambda o, x, at: (x - at.alpha * o) / at.sigma,
        prediction=lambda x0, epsilon, at: x0,
        backtrack=lambda o, z, at, x, to: _along_noise((z - at.alpha * o) / at.sigma, at, x, to),
        x0_gain=lambda at: torch.ones_like(at.alpha),
    ),
    "v_prediction": Parameterization(
        x0=lambda o, x, at: at.alpha * x - at.sigma * o,
        epsilon=lambda o, x, at: at.alpha * o + at.sigma * x,
        prediction=lambda x0, epsilon, at: at.alpha * epsilon - at.sigma * x0,
        backtrack=lambda o, z, at, x, to: _along_velocity(o, at, x, to),
        x0_gain=lambda at: at.sigma,
    ),
    "flow": Parameterization(
        x0=lambda o, x, at: x - at.sigma * o,
        epsilon=lambda o, x, at: x + at.alpha * o,
        prediction=lambda x0, epsilon, at: epsilon - x0,
        backtrack=lambda o, z, at, x, to: x + (at.sigma - to.sigma) * o,
        x0_gain=lambda at: at.sigma,
    ),
}

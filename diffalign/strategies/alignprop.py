"""AlignProp: the gradient of a reward through the last steps of sampling, as many as a draw says.

Paper: Prabhudesai et al., "Aligning Text-to-Image Diffusion Models with Reward Backpropagation", arXiv 2310.03739.
Official code: https://github.com/mihirp1998/AlignProp.

With T steps i = 0 .. T-1 from noise to image, k drawn anew for each optimizer step, and predictions of the steps i < k
taken for constants::

    loss = scale * mean over images of l(R(image, caption))       l(R) = -R, |R - target| or max(target - R, 0)

The gradient passes through the live predictions and through what the sampler does to the latents; each live step is
computed again in backward, so that of each only one latent is kept. Neither pairs nor a reference are needed.

k is drawn once for all images of a step, as the authors' present code does; their first release (and a port that was
made from it) drew one for every denoising step, which the authors call unintended: ``truncation_draw step``. The images
reach the reward in [0, 1], whereas the released loss maps them once more to [0.5, 1]. Nothing holds the model back from
over-optimisation: stop early, and look at a second reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, get_args

import torch

from diffalign.errors import UserError, unknown
from diffalign.strategies.base import Context, Kernel
from diffalign.strategies.registry import register
from diffalign.strategies.reward_gradient import RewardGradient, RewardGradientConfig, TailKernel, update_generator

Truncation = Literal["gaussian", "uniform", "fixed"]
_SELDOM = 0.01
"""Share of a Gaussian's draws that must fit: they are repeated until one does."""


def require_reachable(num_steps: int, mean: float, std: float) -> None:
    """Refuse a Gaussian that hardly ever falls on 1 .. num_steps - 1; arguments as of :func:`draw_truncation`.

    Raises:
        UserError: saying how seldom it does.
    """
    normal = NormalDist(mean, std)
    share = normal.cdf(1) - normal.cdf(1 / num_steps)
    if share < _SELDOM:
        raise UserError(
            f"truncation_mean {mean:g} with truncation_std {std:g}: {share:.1%} of the draws fall on steps 1 to "
            f"{num_steps - 1} of {num_steps}, where a gradient can begin: choose others"
        )


def draw_truncation(
    kind: Truncation, num_steps: int, generator: torch.Generator, *, mean: float = 0.84, std: float = 0.1
) -> int:
    """Draw k, the index of the first step that carries a gradient: 1 .. num_steps - 1.

    Args:
        kind: "gaussian" around a share of the steps, "uniform" over all of them, or "fixed" at the mean, rounded.
        num_steps: T.
        generator: source of randomness.
        mean, std: of the Gaussian, as shares of T.

    Raises:
        UserError: for fewer than 2 steps, another kind, or a Gaussian that hardly ever fits.
    """
    if num_steps < 2:
        raise UserError(f"{num_steps} sampling step: a truncated gradient needs 2 at least")
    if kind == "fixed":
        return min(max(round(mean * num_steps), 1), num_steps - 1)
    if kind == "uniform":
        return int(torch.randint(1, num_steps, (), generator=generator))
    if kind != "gaussian":
        raise unknown("truncation", kind, get_args(Truncation))
    require_reachable(num_steps, mean, std)
    while True:  # drawn again until it fits, as in the official code
        k = int((mean + std * torch.randn((), generator=generator).item()) * num_steps)
        if 1 <= k < num_steps:
            return k


def live_steps(truncations: Sequence[int]) -> list[bool]:
    """Return whether each step carries a gradient: where its index has reached the k that was drawn for it."""
    return [index >= k for index, k in enumerate(truncations)]


@dataclass(frozen=True)
class AlignPropConfig(RewardGradientConfig):
    """Constants of AlignProp.

    Args:
        truncation: how k is drawn: "gaussian" (official code), "uniform" (paper), or "fixed" at the mean.
        truncation_mean: mean of k as a share of the steps. 0.84, 42 of 50: official code.
        truncation_std: its deviation, likewise. 0.1, 5 of 50: official code.
        truncation_draw: one k for the "trajectory", or one for every "step". trajectory: official code.
    """

    truncation: Truncation = "gaussian"
    truncation_mean: float = 0.84
    truncation_std: float = 0.1
    truncation_draw: Literal["trajectory", "step"] = "trajectory"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout_steps < 2:
            raise UserError("rollout_steps is 1: a truncated gradient needs 2 steps at least; draft_k does with 1")
        if not 0 < self.truncation_mean < 1:
            raise UserError(f"truncation_mean is {self.truncation_mean}: expected a share of the steps in (0, 1)")
        if self.truncation_std <= 0:
            raise UserError(f"truncation_std is {self.truncation_std}: expected a share of the steps above 0")
        if self.truncation == "gaussian":
            require_reachable(self.rollout_steps, self.truncation_mean, self.truncation_std)


class AlignPropKernel(TailKernel):
    """Draws which steps carry a gradient."""

    config: AlignPropConfig

    def plan(self, ctx: Context) -> Sequence[bool]:
        c, generator = self.config, update_generator(ctx, "truncation")
        draws = [
            draw_truncation(c.truncation, c.rollout_steps, generator, mean=c.truncation_mean, std=c.truncation_std)
            for _ in range(c.rollout_steps if c.truncation_draw == "step" else 1)
        ]
        return live_steps(draws if c.truncation_draw == "step" else draws * c.rollout_steps)


@register(
    "alignprop",
    summary="the gradient of a reward through randomly many of the last sampling steps",
    paper="Aligning Text-to-Image Diffusion Models with Reward Backpropagation (arXiv 2310.03739)",
    repository="https://github.com/mihirp1998/AlignProp",
    family="reward gradient",
)
class AlignProp(RewardGradient):
    """Climbs a differentiable reward."""

    Config = AlignPropConfig

    def kernel(self) -> Kernel:
        """Sampling whose last steps carry a gradient."""
        return AlignPropKernel(self.config)

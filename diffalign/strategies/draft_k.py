"""DRaFT-K: the gradient of a reward through the last K steps of sampling.

Paper: Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", ICLR 2024, arXiv 2309.17400. No
official code.

AlignProp with a fixed truncation; K = 1 is already strong, and K = T is DRaFT, through the whole chain::

    loss = -scale * mean over images of R(image, caption)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffalign.errors import UserError
from diffalign.strategies.base import Context, Kernel
from diffalign.strategies.registry import register
from diffalign.strategies.reward_gradient import RewardGradient, RewardGradientConfig, TailKernel


@dataclass(frozen=True)
class DraftKConfig(RewardGradientConfig):
    """Constants of DRaFT-K.

    Args:
        rollout_steps: moves from noise to image while training. 50: paper.
        rollout_guidance_scale: guidance of those samples. 7.5: paper.
        eta: share of DDIM's randomness. 0: paper, which samples with DDIM.
        loss_scale: factor on the loss. 1: paper.
        gradient_steps: K, how many of the last moves carry a gradient. 1: paper.
    """

    rollout_guidance_scale: float = 7.5
    eta: float = 0.0
    loss_scale: float = 1.0
    gradient_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.gradient_steps <= self.rollout_steps:
            raise UserError(
                f"gradient_steps is {self.gradient_steps}: expected 1 to rollout_steps, {self.rollout_steps}"
            )


class LastSteps(TailKernel):
    """The last K moves carry a gradient."""

    config: DraftKConfig

    def plan(self, ctx: Context) -> Sequence[bool]:
        constant = self.config.rollout_steps - self.config.gradient_steps
        return [index >= constant for index in range(self.config.rollout_steps)]


@register(
    "draft_k",
    summary="the gradient of a reward through the last K sampling steps",
    paper="Directly Fine-Tuning Diffusion Models on Differentiable Rewards (arXiv 2309.17400)",
    family="reward gradient",
)
class DraftK(RewardGradient):
    """Climbs a differentiable reward, through few steps."""

    Config = DraftKConfig

    def kernel(self) -> Kernel:
        """Sampling whose last K steps carry a gradient."""
        return LastSteps(self.config)

"""ReFL, reward feedback learning: the gradient of a reward through one prediction at a random late step.

Paper: Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", NeurIPS 2023,
arXiv 2304.05977. Official code: https://github.com/THUDM/ImageReward.

Of T steps the first m are made without a gradient, m drawn from the last quarter; then the image is predicted in one
jump::

    x0   = x0(x_m, prediction)                                       a gradient through this prediction alone
    loss = scale * mean over images of max(target - R(x0, caption), 0)   + weight * mean error

The second term, denoising of given images, is the paper's and that of the official SDXL script; the script for SD 1.4
has none, and neither has the default here, for it needs images: without it keep runs short (100 updates), or the model
drifts. With ``pretraining_weight`` above 0 the method needs winners instead of prompts alone.

Images above the target (2, two standard deviations of ImageReward) leave the model alone: rewards on other scales want
another one. Official code trains without guidance. m is drawn once for all images of an optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.errors import UserError
from diffalign.strategies.base import Context, Kernel, LossOutput, Piece, Terms
from diffalign.strategies.pair_kernel import fresh_noise, squared_errors
from diffalign.strategies.registry import register
from diffalign.strategies.reward_gradient import (
    Departure,
    RewardForm,
    RewardGradient,
    RewardGradientConfig,
    RewardKernel,
    jump,
    update_generator,
)


def draw_jump(num_steps: int, earliest: float, generator: torch.Generator) -> int:
    """Draw m, the index of the step that the image is predicted from, uniformly from a share of the steps on.

    Args:
        num_steps: T.
        earliest: share of the steps that comes before all m.
        generator: source of randomness.
    """
    return int(torch.randint(min(round(earliest * num_steps), num_steps - 1), num_steps, (), generator=generator))


@dataclass(frozen=True)
class ReFLConfig(RewardGradientConfig):
    """Constants of ReFL.

    Args:
        rollout_steps: moves from noise to image while training. 40: official code.
        rollout_guidance_scale: guidance of those samples. 1, none: official code.
        eta: share of DDIM's randomness. 1, ancestral sampling: official code.
        loss_form: of the reward. hinge: official code.
        reward_target: above it nothing is gained. 2: official code, for ImageReward.
        loss_scale: factor on the loss of the reward. 0.001: official code.
        earliest_jump: share of the steps before the earliest jump. 0.75, step 30 of 40: official code.
        pretraining_weight: factor on the denoising error of winners. 0: official code for SD 1.4 (1 for SDXL).
    """

    rollout_steps: int = 40
    rollout_guidance_scale: float = 1.0
    eta: float = 1.0
    loss_form: RewardForm = "hinge"
    reward_target: float = 2.0
    loss_scale: float = 1e-3
    earliest_jump: float = 0.75
    pretraining_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.earliest_jump < 1:
            raise UserError(f"earliest_jump is {self.earliest_jump}: expected a share of the steps in [0, 1)")
        if self.pretraining_weight < 0:
            raise UserError(f"pretraining_weight is {self.pretraining_weight}: expected 0 or more")


class LateJump(RewardKernel):
    """Departs at a random late step. Where winners are denoised, their errors are the last column of the terms."""

    config: ReFLConfig

    def draw(self, ctx: Context, batch: ImageBatch) -> Departure:
        step = draw_jump(self.config.rollout_steps, self.config.earliest_jump, update_generator(ctx, "jump"))
        start = self.start(ctx, batch)
        return replace(start, latents=self.moved(ctx, start, [False] * step), step=step)

    def arrive(self, ctx: Context, departure: Departure) -> Tensor:
        return jump(self, ctx, departure)

    def terms(self, ctx: Context, batch: ImageBatch, draws: Departure, piece: Piece) -> Tensor:
        rewards = super().terms(ctx, batch, draws, piece)
        if not self.config.pretraining_weight:
            return rewards
        noised = fresh_noise(ctx, batch).select(piece.rows)
        prediction = ctx.policy.predict(noised.latents, noised.timesteps, noised.condition)
        return torch.cat([rewards, squared_errors(prediction, noised.target)[:, None]], dim=1)


@register(
    "refl",
    summary="the gradient of a reward through one prediction at a random late step",
    paper="ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation (arXiv 2304.05977)",
    repository="https://github.com/THUDM/ImageReward",
    family="reward gradient",
)
class ReFL(RewardGradient):
    """Climbs a differentiable reward up to a target."""

    Config = ReFLConfig

    def __init__(self, config: ReFLConfig) -> None:
        super().__init__(config)
        if config.pretraining_weight:
            self.spec = replace(self.spec, data="winners")

    def kernel(self) -> Kernel:
        """A jump to the image from a random late step."""
        return LateJump(self.config)

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: ImageBatch) -> LossOutput:
        """Return the mean over images, with the errors of winners where they are denoised."""
        output = super().loss(terms, statistics, batch)
        if not self.config.pretraining_weight:
            return output
        errors = terms.policy[:, -1]
        loss = output.loss + self.config.pretraining_weight * errors.mean()
        losses = output.metrics["loss"] + self.config.pretraining_weight * errors.detach()
        return LossOutput(loss, {**output.metrics, "loss": losses, "policy_error_chosen": errors.detach()})

"""DRaFT-LV: DRaFT-1 with less variance, several noisings of each sampled image in place of one.

Paper: Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", ICLR 2024, arXiv 2309.17400. No
official code; this follows the paper's text.

Images are sampled without a gradient. Each is noised n times to the level of the last step t_1, and predicted back from
there, with a gradient through that prediction alone::

    x0_j = x0(x_{t_1, j}, prediction)        x_{t_1, j} = alpha stop_gradient(x_0) + sigma noise_j
    loss = -scale * mean over images and j of R(x0_j, caption)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from diffalign.batch import Condition, ImageBatch
from diffalign.diffusion.random import randn_rows
from diffalign.errors import UserError
from diffalign.strategies.base import Context, Kernel
from diffalign.strategies.registry import register
from diffalign.strategies.reward_gradient import Departure, RewardGradient, RewardGradientConfig, RewardKernel, jump


@dataclass(frozen=True)
class DraftLVConfig(RewardGradientConfig):
    """Constants of DRaFT-LV.

    Args:
        rollout_steps: moves from noise to image while training. 50: paper.
        rollout_guidance_scale: guidance of those samples. 7.5: paper.
        eta: share of DDIM's randomness. 0: paper, which samples with DDIM.
        loss_scale: factor on the loss. 1: paper.
        noisings: n, how often each image is noised. 2: paper.
    """

    rollout_guidance_scale: float = 7.5
    eta: float = 0.0
    loss_scale: float = 1.0
    noisings: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noisings < 1:
            raise UserError(f"noisings is {self.noisings}: expected 1 at least")


class Renoised(RewardKernel):
    """Departs from sampled images, noised again."""

    config: DraftLVConfig

    def draw(self, ctx: Context, batch: ImageBatch) -> Departure:
        steps, n, process = self.config.rollout_steps, self.config.noisings, ctx.policy.process
        start = self.start(ctx, batch)
        clean = self.moved(ctx, start, [False] * steps)
        timestep, _, _ = self.grid(ctx).to(ctx.device).move(steps - 1)
        noise = randn_rows(batch.seeds, (n, *clean.shape[1:]), "renoising", ctx.device).transpose(0, 1).flatten(0, 1)
        clean = clean.repeat(n, *[1] * (clean.dim() - 1))
        return replace(
            start,
            latents=process.add_noise(clean, noise, timestep.expand(len(clean))),
            step=steps - 1,
            seeds=start.seeds.repeat(n),
            condition=Condition.cat([start.condition] * n),
            prompts=list(start.prompts) * n,
            metadata=list(start.metadata) * n,
        )

    def arrive(self, ctx: Context, departure: Departure) -> Tensor:
        return jump(self, ctx, departure)


@register(
    "draft_lv",
    summary="the gradient of a reward through one prediction, averaged over several noisings of the image",
    paper="Directly Fine-Tuning Diffusion Models on Differentiable Rewards (arXiv 2309.17400)",
    family="reward gradient",
)
class DraftLV(RewardGradient):
    """Climbs a differentiable reward, through one step with less variance."""

    Config = DraftLVConfig

    def kernel(self) -> Kernel:
        """Images that are noised again and predicted."""
        return Renoised(self.config)

"""DDPO: the denoising steps of sampled images as actions, rewarded by any function of the image.

Paper: Black et al., "Training Diffusion Models with Reinforcement Learning", ICLR 2024, arXiv 2305.13301.
Official code: https://github.com/kvablack/ddpo-pytorch.

A rollout samples ``images_per_prompt`` images a caption with a stochastic sampler (DDIM with eta; for flow models the
SDE of Flow-GRPO), and keeps latents and densities. With A the standardised reward of an image and r the ratio of a
step's new density to the recorded one::

    loss = mean over images and steps of  max(-A r, -A clamp(r, 1 - c, 1 + c))

Densities are means over latent elements, which is why c is 1e-4. Guidance belongs to the policy: it is the same in
sampling and training. All steps of an image count in the same update. ``updates_per_rollout 1`` with ``inner_epochs 1``
is the score-function variant: the ratio is then 1 when its gradient is taken.

Departures: ``kl_beta`` adds a penalty that the paper leaves out (it stops early against over-optimisation instead), and
images with an advantage of exactly 0 are not replayed where there is no penalty; both still count in the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.strategies.registry import register
from diffalign.strategies.standardised import StandardisedConfig, StandardisedRewards


@dataclass(frozen=True)
class DDPOConfig(StandardisedConfig):
    """Constants of DDPO; the defaults are those of its official code."""


@register(
    "ddpo",
    summary="clipped policy gradient on the denoising steps of own samples, for any reward",
    paper="Training Diffusion Models with Reinforcement Learning (arXiv 2305.13301)",
    repository="https://github.com/kvablack/ddpo-pytorch",
    family="on-policy",
)
class DDPO(StandardisedRewards):
    """Learns from rewards of its own samples."""

    Config = DDPOConfig

"""Images from captions with a policy: seeded for each image, batched, adapters as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.diffusion.guidance import guided
from diffalign.diffusion.random import randn_rows
from diffalign.diffusion.sampling import sample
from diffalign.policies.base import Policy


def generate(
    policy: Policy,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int,
    guidance_scale: float,
    resolution: tuple[int, int] | None = None,
    batch_size: int = 32,
) -> Tensor:
    """Sample one image for each caption.

    Args:
        policy: the model, with whatever adapter is active.
        prompts, seeds: one caption and one seed an image; an image depends on nothing but the two.
        num_steps: denoising steps.
        guidance_scale: 1 switches guidance off.
        resolution: (height, width) in pixels; the model's own by default.
        batch_size: images sampled at once.

    Returns:
        (n, 3, height, width) in [0, 1] on the CPU, rounded to the 256 levels of an image file.
    """
    height, width = resolution or policy.default_resolution
    shape = policy.latent_shape(height, width)
    images = []
    with policy.inference():
        for start in range(0, len(prompts), batch_size):
            chunk = slice(start, start + batch_size)
            condition = policy.with_size(policy.encode_prompts(prompts[chunk]), {"original_size": (height, width)})
            null = policy.with_size(policy.null_condition(len(condition)), {"original_size": (height, width)})
            noise = randn_rows(torch.tensor(seeds[chunk]), shape, "initial noise", policy.device)
            latents = sample(guided(policy.predict, condition, null, guidance_scale), policy.process, noise, num_steps)
            images.append((policy.decode(latents).float().clamp(0, 1) * 255).round().cpu() / 255)
    return torch.cat(images)

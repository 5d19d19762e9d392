"""Images from captions with a policy: seeded for each image, batched, adapters as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.diffusion.guidance import centred, guided
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
    expanded: Sequence[str] | None = None,
    expanded_weight: float = 5.0,
) -> Tensor:
    """Sample one image for each caption.

    Args:
        policy: the model, with whatever adapter is active.
        prompts, seeds: one caption and one seed an image; an image depends on nothing but the two.
        num_steps: denoising steps.
        guidance_scale: 1 switches guidance off.
        resolution: (height, width) in pixels; the model's own by default.
        batch_size: images sampled at once.
        expanded: a longer caption for each; guidance then keeps it near the original one
            (:func:`diffalign.diffusion.guidance.centred_guidance`).
        expanded_weight: of the longer caption, beside ``guidance_scale`` for the original one. 5: paper of Parrot.

    Returns:
        (n, 3, height, width) in [0, 1] on the CPU, rounded to the 256 levels of an image file.
    """
    latents = generate_latents(
        policy,
        prompts,
        seeds,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        resolution=resolution,
        batch_size=batch_size,
        expanded=expanded,
        expanded_weight=expanded_weight,
    )
    return decode_images(policy, latents, batch_size)


def generate_latents(
    policy: Policy,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int,
    guidance_scale: float,
    resolution: tuple[int, int] | None = None,
    batch_size: int = 32,
    expanded: Sequence[str] | None = None,
    expanded_weight: float = 5.0,
) -> Tensor:
    """Sample the latents of one image for each caption, (n, channels, ...); arguments as of :func:`generate`."""
    height, width = resolution or policy.default_resolution
    shape, process = policy.latent_shape(height, width), policy.process_for(height, width)
    parts = []
    with policy.inference():
        for start in range(0, len(prompts), batch_size):
            chunk = slice(start, start + batch_size)
            condition = policy.with_size(policy.encode_prompts(prompts[chunk]), {"original_size": (height, width)})
            null = policy.with_size(policy.null_condition(len(condition)), {"original_size": (height, width)})
            noise = randn_rows(torch.tensor(seeds[chunk]), shape, "initial noise", policy.device)
            if expanded is None:
                predict = guided(policy.predict, condition, null, guidance_scale)
            else:
                longer = policy.with_size(policy.encode_prompts(expanded[chunk]), {"original_size": (height, width)})
                predict = centred(policy.predict, condition, longer, null, guidance_scale, expanded_weight)
            parts.append(sample(predict, process, noise, num_steps))
    return torch.cat(parts)


def decode_images(policy: Policy, latents: Tensor, batch_size: int = 32) -> Tensor:
    """Decode latents (n, channels, ...) to images as :func:`generate` returns them."""
    with policy.inference():
        decoded = [policy.decode(part).cpu() for part in latents.split(batch_size)]
    return (torch.cat(decoded) * 255).round() / 255

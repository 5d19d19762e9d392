"""Classifier-free guidance: from a conditional denoiser to a function of latents and timesteps alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, cat

from diffalign.batch import Condition

Predictor = Callable[[Tensor, Tensor], Tensor]
"""(latents, timesteps) -> prediction."""
Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]
"""(latents, timesteps, condition) -> prediction."""


def guided(
    denoiser: Denoiser,
    condition: Condition,
    null: Condition | None = None,
    guidance_scale: float = 1.0,
    detach_null: bool = False,
) -> Predictor:
    """Close a denoiser over its condition.

    Args:
        denoiser: the policy's ``predict``.
        condition: (rows) the captions.
        null: (rows) the unconditional branch; only used when ``guidance_scale`` differs from 1. Tensors that it lacks
            (sizes) are those of ``condition``.
        guidance_scale: 1 is the conditional model alone; otherwise ``u + scale * (c - u)``, both branches in one call.
        detach_null: no gradient through the unconditional branch, as Flow-GRPO's code trains.
    """
    if guidance_scale == 1.0:
        return lambda latents, timesteps: denoiser(latents, timesteps, condition)
    if null is None:
        raise ValueError("guidance needs the unconditional branch")
    both = Condition.cat([null.completed(condition), condition])

    def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
        unconditional, conditional = denoiser(cat([latents, latents]), cat([timesteps, timesteps]), both).chunk(2)
        if detach_null:
            unconditional = unconditional.detach()
        return unconditional + guidance_scale * (conditional - unconditional)

    return predict

"""Classifier-free guidance: from a conditional denoiser to a function of latents and timesteps alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, cat, is_grad_enabled, no_grad

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
        detach_null: no gradient through the unconditional branch, as Flow-GRPO's code trains. It is evaluated by itself
            then, so that nothing is kept for its backward pass.
    """
    if guidance_scale == 1.0:
        return lambda latents, timesteps: denoiser(latents, timesteps, condition)
    if null is None:
        raise ValueError("guidance needs the unconditional branch")
    whole = null.completed(condition)
    both = Condition.cat([whole, condition])

    def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
        if detach_null and is_grad_enabled():
            with no_grad():
                unconditional = denoiser(latents, timesteps, whole)
            conditional = denoiser(latents, timesteps, condition)
        else:
            unconditional, conditional = denoiser(cat([latents, latents]), cat([timesteps, timesteps]), both).chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return predict


def centred_guidance(original: Tensor, expanded: Tensor, null: Tensor, w1: float = 5.0, w2: float = 5.0) -> Tensor:
    """Guide towards an expanded caption without leaving the original one (Parrot, arXiv 2401.05675).

    ``w1 e(original) + (1 - w1 - w2) e(null) + w2 e(expanded)``, for any parameterisation; the factors add up to 1.

    Args:
        original, expanded, null: (rows, channels, ...) predictions under the three captions.
        w1, w2: weights of the original and the expanded caption. 5 and 5: paper. ``w2 = 0`` is ordinary guidance.
    """
    return w1 * original + (1 - w1 - w2) * null + w2 * expanded


def centred(
    denoiser: Denoiser, original: Condition, expanded: Condition, null: Condition, w1: float = 5.0, w2: float = 5.0
) -> Predictor:
    """Close a denoiser over an original and an expanded caption, see :func:`centred_guidance`.

    Args:
        denoiser: the policy's ``predict``.
        original, expanded, null: (rows) the captions and the unconditional branch, evaluated in one call.
        w1, w2: weights of the original and the expanded caption.
    """
    every = Condition.cat([original, expanded, null.completed(original)])

    def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
        first, second, third = denoiser(cat([latents] * 3), cat([timesteps] * 3), every).chunk(3)
        return centred_guidance(first, second, third, w1, w2)

    return predict

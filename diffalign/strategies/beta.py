"""The inverse temperature of denoising errors, in the two conventions that papers and code use.

Here, as in the public code, beta multiplies errors averaged over the n elements of an image, times 0.5 in the methods
that follow Diffusion-DPO's; papers write sums over the elements::

    beta_sum = factor * beta / n          factor = 0.5 or 1
"""

from __future__ import annotations

import math

from diffalign.strategies.base import Context


def beta_for_sums(beta: float, elements: int, factor: float = 0.5) -> float:
    """Return the beta of errors summed over an image's elements that gives the logit of ``beta`` here.

    Args:
        beta: of errors averaged over elements.
        elements: number of elements of an image's latents.
        factor: what else the method multiplies it by: 0.5 in Diffusion-DPO's convention.
    """
    return factor * beta / elements


def describe_beta(ctx: Context, beta: float, factor: float = 0.5) -> tuple[str, ...]:
    """Return the line of the run's header that says what beta is in the paper's terms, for the run's model and size."""
    elements = math.prod(ctx.latent_shape)
    return (
        f"beta {beta:g} on errors of {ctx.policy.process.prediction_type} averaged over the {elements} elements of an "
        f"image, {beta_for_sums(beta, elements, factor):.3g} on their sums",
    )

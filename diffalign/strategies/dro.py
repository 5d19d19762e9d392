"""Diffusion-DRO: a denoising hinge between expert images and the policy's own samples.

Paper: Wu et al., "Ranking-based Preference Optimization for Diffusion Models from Implicit User Feedback", NeurIPS
2025, arXiv 2510.18353. Official code: https://github.com/basiclab/DiffusionDRO.

Expert images are noised afresh; the policy's samples are latents of its own trajectory with the noise that it predicted
there. With errors as means over elements and the margin made for means::

    loss = mean over examples of max((err_w - ref_err_w) - (err_l - ref_err_l) + margin, 0)

The reference only decides which examples are active.
"""

from __future__ import annotations

from torch import Tensor

from diffalign.strategies.base import LossOutput
from diffalign.strategies.pair_loss import PairErrors


def ranking_hinge(errors: PairErrors, margin: float = 0.001) -> LossOutput:
    """Return the mean hinge over examples.

    Args:
        errors: of expert images (chosen) and of the policy's own samples (rejected).
        margin: 0.001: official code.
    """
    gap: Tensor = errors.d_l - errors.d_w
    losses = (gap + margin).clamp(min=0)
    active = (losses.detach() > 0).to(losses.dtype)
    metrics = {"loss": losses.detach(), "expert_gap": gap.detach(), "active_share": active}
    return LossOutput(losses.mean(), {**metrics, **errors.metrics()})

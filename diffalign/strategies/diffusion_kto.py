"""Diffusion-KTO: likes and dislikes of single images, no pairs.

Paper: Li et al., "Aligning Diffusion Models by Optimizing Human Utility", NeurIPS 2024, arXiv 2404.04465.
Official code: https://github.com/jacklishufan/diffusion-kto.

Every image has a timestep and noise of its own. With err and ref_err the mean squared errors of policy and reference
over the elements of an image, w = +1 for a liked and -1 for a disliked one::

    g_i  = ref_err_i - err_i                              what the policy gained over the reference
    q    = max(0, mean g)                                 reference point, no gradient
    loss = mean_i lambda_i (1 - U(w_i beta (g_i - q)))    U = sigmoid, lambda = weight of the label

beta multiplies a difference of MEANS over elements, without the factor 1/2 of Diffusion-DPO; for sums over n elements
it would be beta / n. The target is what the model predicts: epsilon and v as published, velocity for flow (ours).

Departures:

- q is a mean over the whole optimizer step and all processes, so that neither accumulation nor the number of processes
  changes the loss. The official code takes it over one micro-batch of all processes: ``reference_scope: micro_batch``.
- Every image is seen once an epoch. The official sampler draws liked images four times in five: where they are a share
  s of the data, ``weight_liked`` 0.8 / s and ``weight_disliked`` 0.2 / (1 - s) weigh the gradients alike in the mean.
- Captions stay; the official code drops a fifth of them: ``--caption_dropout 0.2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.strategies.base import Context, Piece, Spec
from diffalign.strategies.pair_kernel import Noised
from diffalign.strategies.registry import register
from diffalign.strategies.utility import PointRule, Utility, UtilityConfig, UtilityStrategy


@dataclass(frozen=True)
class DiffusionKTOConfig(UtilityConfig):
    """Constants of Diffusion-KTO.

    Args:
        utility: "sigmoid" (best in the paper), "loss_averse" or "risk_seeking" (the official code's "3").
        reference_point: "batch_mean" (official "none": the batch's own gains, clamped at 0), "class_means" (official
            "sigmoid": average of the means of liked and disliked, a class without examples counting 0) or "mismatched"
            (official "original": gains of the images under each other's captions, not clamped; two more evaluations
            without gradient, and two images at least in a micro-batch). "batch_mean": official default.
    """

    utility: Utility = "sigmoid"
    reference_point: PointRule = "batch_mean"


@register(
    "diffusion_kto",
    summary="likes and dislikes of single images through a human utility, no pairs",
    paper="Aligning Diffusion Models by Optimizing Human Utility (arXiv 2404.04465)",
    repository="https://github.com/jacklishufan/diffusion-kto",
)
class DiffusionKTO(UtilityStrategy):
    """Learns from unpaired labels."""

    spec = Spec(data="unpaired", statistics="update")
    Config = DiffusionKTOConfig

    def __init__(self, config: DiffusionKTOConfig) -> None:
        super().__init__(config, config.utility, config.reference_point)

    def frozen(self, ctx: Context, batch: ImageBatch, draws: Noised, piece: Piece) -> Mapping[str, Tensor]:
        """Add the gains under other images' captions where the reference point wants them."""
        values = super().frozen(ctx, batch, draws, piece)
        if self.config.reference_point != "mismatched":
            return values
        return {**values, "mismatched_gain": self._mismatched_gain(ctx, batch, draws, piece)}

    def _mismatched_gain(self, ctx: Context, batch: ImageBatch, draws: Noised, piece: Piece) -> Tensor:
        """Gains (rows, 1) of the images under their neighbours' captions; never cached, as neighbours change."""
        neighbours = torch.arange(len(draws.latents), device=draws.latents.device).roll(1)
        rolled = replace(draws, condition=draws.condition.select(neighbours))
        reference = super().frozen(ctx, replace(batch, cache_keys=None), rolled, piece)["reference"]
        with ctx.policy.inference():
            return reference - self._kernel.terms(ctx, batch, rolled, piece)

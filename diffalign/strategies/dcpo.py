"""DCPO, dual caption preference optimisation: two images, each under a caption of its own.

Paper: Saeidi et al., "Dual Caption Preference Optimization for Diffusion Models", arXiv 2502.06023. The trainer was not
available to us; its documentation states a fork of Diffusion-DPO's script.

Diffusion-DPO with captions z_w and z_l in place of the common one. The images share timestep and noise::

    err(x, z) = mean over elements of (prediction(x_t, t, z) - target)^2
    d_w       = ref_err(x_w, z_w) - err(x_w, z_w)
    d_l       = ref_err(x_l, z_l) - err(x_l, z_l)
    loss      = mean over pairs of -log sigmoid(0.5 beta (d_w - d_l))

The captions come with the data. The paper's recipes: captions of both images by a captioner; the prompt and a
perturbed prompt; or a captioner's caption and a perturbed one (best in the paper, of medium strength). The same formula
serves epsilon, v and flow. For errors summed over n elements the logit has 0.5 * beta / n; how beta depends on what the
model predicts is told in ``diffusion_dpo``.

People ask with prompts, not with captions, and an odd caption can be told from a true one without looking at the image.
A ``common_caption_share`` of the pairs, drawn anew each time, can therefore keep the chosen image's caption for both.

Note: with different captions the partition functions of the two images do not cancel; the method drops them, so the
logit has no calibrated meaning across pairs. With equal captions it is Diffusion-DPO, number for number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.diffusion.random import row_generators
from diffalign.errors import UserError
from diffalign.strategies.base import Context, Kernel, LossOutput, Spec, Terms
from diffalign.strategies.pair_kernel import DenoisingKernel, Noised
from diffalign.strategies.pair_loss import PairConfig, PairErrors, PairObjective, PairStrategy
from diffalign.strategies.registry import register


@dataclass(frozen=True)
class DCPOConfig(PairConfig):
    """Constants of DCPO.

    Args:
        sft_weight: weight of the chosen image's own error, added to the loss. 0: paper.
        rejected_gradient_scale: factor on the gradient through the rejected image. 1: paper.
        beta: inverse temperature, in Diffusion-DPO's convention. 500: the official command for SD 2.1.
        common_caption_share: share of the pairs whose two images have the chosen one's caption. 0: paper; 1 is
            Diffusion-DPO.
    """

    beta: float = 500.0
    common_caption_share: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.common_caption_share <= 1:
            raise UserError(f"common_caption_share is {self.common_caption_share}: expected a share from 0 to 1")


def with_common_captions(batch: ImageBatch, share: float) -> ImageBatch:
    """Give the rejected image the chosen one's caption in a share of the pairs, which their seeds choose."""
    if share == 0:
        return batch
    drawn = torch.cat([torch.rand(1, generator=generator) for generator in row_generators(batch.seeds, "caption")])
    rows = torch.arange(batch.size) + batch.size * (drawn >= share)
    return replace(batch, conditions=(batch.conditions[0], batch.condition.select(rows.to(batch.latents.device))))


@register(
    "dcpo",
    summary="Diffusion-DPO with a caption of its own for each image of a pair",
    paper="Dual Caption Preference Optimization for Diffusion Models (arXiv 2502.06023)",
)
class DCPO(PairStrategy):
    """Learns from pairs with two captions."""

    spec = Spec(data="caption_pairs")
    Config = DCPOConfig

    def __init__(self, config: DCPOConfig) -> None:
        super().__init__(config)
        self.objective = PairObjective(config)

    def kernel(self) -> Kernel:
        """One timestep and one noise a pair."""
        return DenoisingKernel.drawing(self.config)

    def draw(self, ctx: Context, batch: ImageBatch) -> Noised:
        """Choose the pairs with a common caption, then noise."""
        noised: Noised = super().draw(ctx, with_common_captions(batch, self.config.common_caption_share))
        return noised

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: ImageBatch) -> LossOutput:
        """Log-sigmoid of the margin between (image, caption) and (image, caption)."""
        return self.objective(PairErrors.of(terms))

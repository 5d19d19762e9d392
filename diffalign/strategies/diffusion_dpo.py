"""Diffusion-DPO: pairs of images, the chosen one denoised better than by the reference, the rejected one worse.

Paper: Wallace et al., "Diffusion Model Alignment Using Direct Preference Optimization", CVPR 2024, arXiv 2311.12908.
Official code: https://github.com/SalesforceAIResearch/DiffusionDPO.

The two images of a pair share one timestep and one noise. With err and ref_err the mean squared errors of policy and
reference over the elements of an image::

    d_w  = ref_err_w - err_w        d_l = ref_err_l - err_l
    z    = 0.5 beta (d_w - d_l)
    loss = mean over pairs of -log sigmoid(z)

The loss starts at log 2 with a gradient that is not zero, and hovers near it while win rates rise: watch the accuracy
and the winner's margin.

beta by reduction: here (and in the code) errors are means over the n elements of an image; in the paper they are sums,
with ``beta_sum = 0.5 beta / n``, thus 2000 on SD 1.5 (n = 16384) is 0.061 and 5000 on SDXL (n = 65536) is 0.038.
beta by what the model predicts, the errors being those of the prediction itself: epsilon 2000 to 5000; v has errors
larger by ``1 / alpha^2``, so the same beta weighs high noise more; flow 100 (public SD3.5 script), as the error in
epsilon is ``(1 - sigma)^2`` times that in velocity.

Departures from the paper, all those of the code: noise is shared in a pair, the weight over timesteps is constant, and
the number of timesteps is absorbed in beta. A tie counts one half in the accuracy; in the code it counts zero.
The hinge and IPO heads are those of the diffusers script, whose beta is half of ours. Captions stay unless
``--caption_dropout`` says otherwise; the code drops a fifth of them (0.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.errors import UserError
from diffalign.strategies.base import Context, Kernel, LossOutput, Spec, Terms
from diffalign.strategies.heads import Head, check_label_smoothing
from diffalign.strategies.pair_kernel import (
    DenoisingKernel,
    Noised,
    draw_few_step_timesteps,
    noised_at,
    shared_noise,
)
from diffalign.strategies.pair_loss import PairConfig, PairErrors, PairObjective, PairStrategy
from diffalign.strategies.registry import register


@dataclass(frozen=True)
class DiffusionDPOConfig(PairConfig):
    """Constants of Diffusion-DPO.

    Args:
        sft_weight: weight of the chosen image's own error, added to the loss. 0: paper.
        rejected_gradient_scale: factor on the gradient through the rejected image. 1: paper.
        beta: inverse temperature on differences of mean errors. 2000: the paper's main SD 1.5 result (5000 for SDXL).
        head: loss of the logit, "sigmoid" (paper), "hinge" or "ipo" (diffusers script).
        label_smoothing: probability that a label is wrong, for the sigmoid head. 0: paper.
        few_step_timesteps: train on so many evenly spread timesteps only, those a distilled model knows; 4 for SD-Turbo
            and SDXL-Turbo (official code: 249, 499, 749, 999). 0, all timesteps: paper.
    """

    beta: float = 2000.0
    head: Head = "sigmoid"
    label_smoothing: float = 0.0
    few_step_timesteps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.few_step_timesteps < 0:
            raise UserError(f"few_step_timesteps is {self.few_step_timesteps}: expected 0 (all timesteps) or more")
        if self.few_step_timesteps and self.timestep_floor:
            raise UserError("timestep_floor belongs to training on all timesteps, not to few_step_timesteps: set one")
        check_label_smoothing(self.label_smoothing, self.head)


@register(
    "diffusion_dpo",
    summary="pairs against a frozen reference, trained on noised images",
    paper="Diffusion Model Alignment Using Direct Preference Optimization (arXiv 2311.12908)",
    repository="https://github.com/SalesforceAIResearch/DiffusionDPO",
)
class DiffusionDPO(PairStrategy):
    """Learns from pairs of images of one caption."""

    spec = Spec(data="pairs")
    Config = DiffusionDPOConfig

    def __init__(self, config: DiffusionDPOConfig) -> None:
        super().__init__(config)
        self.objective = PairObjective(config, config.head, config.label_smoothing)

    def kernel(self) -> Kernel:
        """One timestep and one noise a pair."""
        if self.config.few_step_timesteps:
            return DenoisingKernel(self._few_step_noise)
        return DenoisingKernel.drawing(self.config)

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: ImageBatch) -> LossOutput:
        """Return the mean of ``head(z)`` over the pairs."""
        return self.objective(PairErrors.of(terms))

    def _few_step_noise(self, ctx: Context, batch: ImageBatch) -> Noised:
        timesteps = draw_few_step_timesteps(ctx, batch, self.config.few_step_timesteps)
        return noised_at(ctx, batch, timesteps, shared_noise(ctx, batch))

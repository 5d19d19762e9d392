"""DCPO, dual caption preference optimisation: two images, each under a caption of its own.

Paper: Saeidi et al., "Dual Caption Preference Optimization for Diffusion Models", arXiv 2502.06023. The trainer was not
available to us; its documentation states a fork of Diffusion-DPO's script.

Diffusion-DPO with captions z_w and z_l in the place of the common one. The images share timestep and noise::

    err(x, z) = mean over elements of (prediction(x_t, t, z) - target)^2
    d_w       = ref_err(x_w, z_w) - err(x_w, z_w)
    d_l       = ref_err(x_l, z_l) - err(x_l, z_l)
    loss      = mean over pairs of -log sigmoid(0.5 beta (d_w - d_l))

The captions come with the data. The paper's recipes: captions of both images by a captioner; the prompt and a
perturbed prompt; or a captioner's caption and a perturbed one (best in the paper, of medium strength). The same formula
serves epsilon, v and flow. For errors summed over n elements the logit has 0.5 * beta / n; how beta depends on what the
model predicts is told in ``diffusion_dpo``.

Note: with different captions the partition functions of the two images do not cancel; the method drops them, so the
logit has no calibrated meaning across pairs. With equal captions it is Diffusion-DPO, number for number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.strategies.base import Kernel, LossOutput, Spec, Terms
from diffalign.strategies.pair_kernel import DenoisingKernel
from diffalign.strategies.pair_loss import PairConfig, PairErrors, PairObjective, PairStrategy
from diffalign.strategies.registry import register


@dataclass(frozen=True)
class DCPOConfig(PairConfig):
    """Constants of DCPO.

    Args:
        sft_weight: weight of the chosen image's own error, added to the loss. 0: paper.
        rejected_gradient_scale: factor on the gradient through the rejected image. 1: paper.
        beta: inverse temperature, in Diffusion-DPO's convention. 500: the official command for SD 2.1.
    """

    beta: float = 500.0


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
        self.objective = PairObjective(config.beta, config)

    def kernel(self) -> Kernel:
        """One timestep and one noise a pair."""
        return DenoisingKernel()

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: ImageBatch) -> LossOutput:
        """Log-sigmoid of the margin between (image, caption) and (image, caption)."""
        return self.objective(PairErrors.of(terms))

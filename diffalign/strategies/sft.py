"""SFT, plain fine-tuning on the chosen images: the honest baseline of every preference method.

The denoising objective the models were trained with, on winners alone::

    err  = mean over the elements of an image of (prediction - target)^2
    loss = mean err

The target is what the model predicts: epsilon, v, or velocity for flow. It equals the supervised switch of the official
Diffusion-DPO script (https://github.com/SalesforceAIResearch/DiffusionDPO, ``--train_method sft``). No reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.strategies.base import Kernel, LossOutput, Spec, Strategy, Terms
from diffalign.strategies.pair_kernel import DenoisingKernel, TimestepOptions
from diffalign.strategies.registry import register


@dataclass(frozen=True)
class SFTConfig(TimestepOptions):
    """SFT has no constants of its own."""


@register(
    "sft",
    summary="plain fine-tuning on the chosen images; the baseline of all others",
    paper="supervised switch of Diffusion-DPO (arXiv 2311.12908)",
    repository="https://github.com/SalesforceAIResearch/DiffusionDPO",
    family="supervised",
)
class SFT(Strategy):
    """Fine-tunes on winners."""

    spec = Spec(data="winners", needs_reference=False)
    Config = SFTConfig

    def kernel(self) -> Kernel:
        """Fresh noise and timestep for each image."""
        return DenoisingKernel.drawing(self.config)

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: ImageBatch) -> LossOutput:
        """Return the mean error."""
        errors = terms.policy.mean(dim=1)
        reported = errors.detach()
        return LossOutput(errors.mean(), {"loss": reported, "policy_error_chosen": reported})

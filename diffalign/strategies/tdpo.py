"""TDPO, text preference optimisation from pairs of captions: one image, a matching and a mismatched caption.

Paper: Xian et al., "Free Lunch Alignment of Text-to-Image Diffusion Models without Preference Image Pairs",
arXiv 2509.25771. Official code: https://github.com/DSL-Lab/T2I-Free-Lunch-Alignment.

One image x, one timestep, one noise, seen under both captions::

    err(c) = mean over elements of (prediction(x_t, t, c) - target)^2
    d_w    = ref_err(c_w) - err(c_w)        d_l = ref_err(c_l) - err(c_l)
    loss   = mean over images of -log sigmoid(0.5 beta (d_w - d_l))

The targets of both rows are one tensor, hence captions that read alike cancel exactly, gradient included. Captions must
not be dropped (two empty ones teach nothing), nor may an edit lie beyond the text encoder's last token: what the
encoder does not tell apart cannot be learned, and ``caption_cosine`` of the two embeddings is 1. The same formula
serves epsilon, v and flow. For errors summed over n elements the logit has 0.5 * beta / n; how beta depends on what the
model predicts is told in ``diffusion_dpo``.

The mismatched caption is a fine caption of another image: watch ``policy_error_chosen`` beside the reference's, for the
margin keeps rising while both errors do and samples fall apart. Then ``sft_weight``, a ``rejected_gradient_scale``
below 1, or a larger beta helps, and ``rejected_gradient_ratio`` bounds the push. The constants are Diffusion-DPO's,
since the paper's are not known to us.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.strategies.base import Kernel, LossOutput, Spec, Terms
from diffalign.strategies.pair_kernel import DenoisingKernel
from diffalign.strategies.pair_loss import PairConfig, PairErrors, PairObjective, PairStrategy
from diffalign.strategies.registry import register


@dataclass(frozen=True)
class TDPOConfig(PairConfig):
    """Constants of TDPO.

    Args:
        sft_weight: weight of the error under the matching caption, added to the loss. 0: paper.
        rejected_gradient_scale: factor on the gradient through the mismatched caption. 1: paper.
        beta: inverse temperature, in Diffusion-DPO's convention. 2000: that method's on SD 1.5.
    """

    beta: float = 2000.0


@register(
    "tdpo",
    summary="an image under its caption against the same image under a wrong one; no preference images",
    paper="Free Lunch Alignment of Text-to-Image Diffusion Models without Preference Image Pairs (arXiv 2509.25771)",
    repository="https://github.com/DSL-Lab/T2I-Free-Lunch-Alignment",
)
class TDPO(PairStrategy):
    """Learns which of two captions an image has."""

    spec = Spec(data="mismatched_captions")
    Config = TDPOConfig
    glossary: ClassVar[Mapping[str, str]] = {
        "prompt_margin": "policy's error under the wrong caption minus that under the right one",
        "caption_cosine": "cosine of the embeddings of the two captions; 1 where the text encoder sees no difference",
    }

    def __init__(self, config: TDPOConfig) -> None:
        super().__init__(config)
        self.objective = PairObjective(config)

    def kernel(self) -> Kernel:
        """The same noisy image under both captions."""
        return DenoisingKernel.drawing(self.config)

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: ImageBatch) -> LossOutput:
        """Log-sigmoid of the margin between the captions, and how far apart the policy tells them."""
        errors = PairErrors.of(terms)
        output = self.objective(errors)
        metrics = {**output.metrics, "prompt_margin": (errors.err_l - errors.err_w).detach()}
        embeds = [c.tensors["prompt_embeds"].float() for c in batch.conditions if "prompt_embeds" in c.tensors]
        if len(embeds) == 2:
            metrics["caption_cosine"] = torch.cosine_similarity(embeds[0].flatten(1), embeds[1].flatten(1))
        return LossOutput(output.loss, metrics)

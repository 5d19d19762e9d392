"""TKTO, text preference optimisation from single captions: one image under a matching and under a mismatched caption.

Paper: Xian et al., "Free Lunch Alignment of Text-to-Image Diffusion Models without Preference Image Pairs",
arXiv 2509.25771. Official code: https://github.com/DSL-Lab/T2I-Free-Lunch-Alignment.

Diffusion-KTO's objective with captions in place of judgements: w = +1 for a matching, -1 for a mismatched caption::

    g_i  = ref_err(x_t, c_i) - err(x_t, c_i)
    q    = max(0, mean g)                          over the whole optimizer step and all processes, no gradient
    loss = mean_i lambda_i (1 - sigmoid(w_i beta (g_i - q)))

Every caption is judged by itself, but both see one noisy image x_t: what of the error comes from noise and timestep
weighs on both alike and cancels in the gradient, and what is left comes from how the model reads the edit. The same
formula serves epsilon, v and flow. beta multiplies means over elements (for sums over n elements: beta / n). The
formula is the paper's definition; the constants are Diffusion-KTO's, since the paper's are not known to us. Captions
must not be dropped: an empty caption matches as well as another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.strategies.base import LossOutput, Piece, Spec, Terms
from diffalign.strategies.registry import register
from diffalign.strategies.utility import UtilityConfig, UtilityStrategy


@dataclass(frozen=True)
class TKTOConfig(UtilityConfig):
    """Constants of TKTO, Diffusion-KTO's: a matching caption counts as liked, a mismatched one as disliked."""


@register(
    "tkto",
    summary="an image under a matching and a mismatched caption, as liked and disliked; no preference images",
    paper="Free Lunch Alignment of Text-to-Image Diffusion Models without Preference Image Pairs (arXiv 2509.25771)",
    repository="https://github.com/DSL-Lab/T2I-Free-Lunch-Alignment",
)
class TKTO(UtilityStrategy):
    """Learns which captions fit."""

    spec = Spec(data="mismatched_captions", statistics="update")
    Config = TKTOConfig

    def labels(self, batch: ImageBatch, piece: Piece, like: Tensor) -> Tensor:
        """Return 1 for rows under matching captions, the first block, and 0 for those under mismatched ones."""
        count = len(batch.seeds)
        label = torch.cat([like.new_ones(count, 1), like.new_zeros(count, 1)])
        return label if piece.rows is None else label[piece.rows]

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: ImageBatch) -> LossOutput:
        """See :class:`UtilityObjective`; metrics are means over the two captions of an image."""
        output = super().loss(terms, statistics, batch)
        by_image = {name: v.unflatten(0, (2, -1)).mean(0) if v.dim() else v for name, v in output.metrics.items()}
        return LossOutput(output.loss, by_image)

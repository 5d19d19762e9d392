"""TKTO, text preference optimisation from labels: one image, one caption, and whether they match.

Paper: Xian et al., "Free Lunch Alignment of Text-to-Image Diffusion Models without Preference Image Pairs",
arXiv 2509.25771. Official code: https://github.com/DSL-Lab/T2I-Free-Lunch-Alignment.

Diffusion-KTO's objective with captions in the place of judgements: w = +1 for a matching, -1 for a mismatched caption::

    g_i  = ref_err(x, c_i) - err(x, c_i)
    q    = max(0, mean g)                          over the whole optimizer step and all processes, no gradient
    loss = mean_i lambda_i (1 - sigmoid(w_i beta (g_i - q)))

The same formula serves epsilon, v and flow. beta multiplies means over elements (for sums over n elements: beta / n).
The formula is the paper's definition; the constants are Diffusion-KTO's, since the paper's are not known to us.
Captions must not be dropped: an empty caption matches as well as another.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.strategies.base import Spec
from diffalign.strategies.registry import register
from diffalign.strategies.utility import UtilityConfig, UtilityStrategy


@dataclass(frozen=True)
class TKTOConfig(UtilityConfig):
    """Constants of TKTO, Diffusion-KTO's: a matching caption has label 1, a mismatched one 0."""


@register(
    "tkto",
    summary="an image with a matching or a mismatched caption, as liked and disliked; no preference images",
    paper="Free Lunch Alignment of Text-to-Image Diffusion Models without Preference Image Pairs (arXiv 2509.25771)",
    repository="https://github.com/DSL-Lab/T2I-Free-Lunch-Alignment",
)
class TKTO(UtilityStrategy):
    """Learns which captions fit."""

    spec = Spec(data="labelled_captions", statistics="update")
    Config = TKTOConfig

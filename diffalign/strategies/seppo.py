"""SePPO: winners against images of an earlier checkpoint, which count as losers only where the policy leads.

Paper: Zhang et al., "SePPO: Semi-Policy Preference Optimization for Diffusion Alignment", arXiv 2410.05255. The
official repository (https://github.com/DwanZhang-AI/SePPO) holds no training code; this follows the formulas.

With err of the winner (w) and of the image sampled by the drawn checkpoint (r), which is the reference too::

    d_w  = ref_err_w - err_w         d_r = ref_err_r - err_r
    s    = sign(d_w), no gradient    +1: r is a loser, -1: r is another winner
    loss = mean over winners of -log sigmoid(beta (d_w - s d_r))
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffalign.errors import unknown
from diffalign.strategies.pair_loss import PairErrors

Flip = Literal["sign", "indicator", "none"]
_FLIPS = ("sign", "indicator", "none")


def anchor_sign(d_w: Tensor, flip: Flip = "sign", tolerance: float = 0.0) -> Tensor:
    """Return how the sampled image counts, (B,), without a gradient.

    Args:
        d_w: (B,) by how much the policy denoises the winner better than the reference.
        flip: "sign" (paper): another winner where the policy lags; "indicator": ignored there; "none": always a loser.
        tolerance: differences no larger count as 0, for rounding at the start where policy equals reference.

    Raises:
        UserError: for another ``flip``.
    """
    if flip not in _FLIPS:
        raise unknown("flip", flip, _FLIPS)
    d_w = d_w.detach()
    if flip == "none":
        return torch.ones_like(d_w)
    sign = torch.where(d_w.abs() <= tolerance, torch.zeros_like(d_w), d_w.sign())
    return sign.clamp(min=0) if flip == "indicator" else sign


def anchored_margin(errors: PairErrors, sign: Tensor) -> Tensor:
    """Return ``d_w - s d_r``, (B,), the sampled images standing in the place of the rejected ones.

    Args:
        errors: of winners and sampled images.
        sign: (B,) of :func:`anchor_sign`.
    """
    return errors.d_w - sign * errors.d_l

"""How a PickScore-like scorer is trained (Kirstain et al., arXiv 2305.01569): two logits, soft labels, ties.

Each example's loss is the cross entropy of ``softmax(s_0, s_1)`` with its label; a tie's optimum, log 2, is taken off,
so that the best value is 0 everywhere. Examples are weighted by one over the number of examples of their caption.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.errors import unknown
from diffalign.rewards.pickscore import preference_logits

MarginLoss = Literal["hinge", "hinge_smooth", "logistic"]


def caption_weights(examples_per_caption: Tensor) -> Tensor:
    """Weights of examples, (batch,), sum 1: captions count alike however many examples they have."""
    weights = 1.0 / examples_per_caption
    return weights / weights.sum()


def pair_logits(text: Tensor, first: Tensor, second: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Logits of both images for their own caption, (batch, 2), from unit embeddings (batch, dimensions)."""
    return torch.stack([preference_logits(image, text, logit_scale) for image in (first, second)], dim=-1)


def preference_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """PickScore's objective without negatives from the batch.

    Args:
        logits: (batch, 2) of the two images.
        labels: (batch,) 1 if the first is preferred, 0 if the second, 1/2 for a tie.
        weights: (batch,), sum 1; equal by default. See :func:`caption_weights`.

    Returns:
        scalar; 0 is the optimum.
    """
    log_p = logits.log_softmax(-1)
    return _averaged(_without_ties(-labels * log_p[:, 0] - (1 - labels) * log_p[:, 1], labels), weights)


def in_batch_cross_entropy(
    text: Tensor,
    first: Tensor,
    second: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    weights: Tensor | None = None,
) -> Tensor:
    """The variant with negatives from the batch: captions choose among all images, images among all captions.

    Args:
        text, first, second: unit embeddings (batch, dimensions) of captions and of both images.
        labels, weights: as in :func:`preference_cross_entropy`.
        logit_scale: factor of cosines.
    """
    count = len(text)
    logits = logit_scale * text @ torch.cat([first, second]).T  # (batch, 2 batch)
    own = torch.arange(count, device=text.device)
    log_p = logits.log_softmax(-1)
    chosen = -labels * log_p[own, own] - (1 - labels) * log_p[own, own + count]
    by_image = F.cross_entropy(logits.T, torch.cat([own, own]), reduction="none").view(2, count)
    described = labels * by_image[0] + (1 - labels) * by_image[1]
    return _averaged((_without_ties(chosen, labels) + described) / 2, weights)


def heteroscedastic_cross_entropy(
    means: Tensor, log_variances: Tensor, labels: Tensor, weights: Tensor | None = None
) -> Tensor:
    """A scorer that also says how sure it is: scores are normal, and the margin's probit is the preference.

    ``P(first preferred) = Phi((m_0 - m_1) / sqrt(1 + v_0 + v_1))``: doubtful images pull less.

    Args:
        means: (batch, 2) of the two images' scores.
        log_variances: (batch, 2), logarithms of v.
        labels, weights: as in :func:`preference_cross_entropy`.
    """
    margin = (means[:, 0] - means[:, 1]) / (1 + log_variances.exp().sum(-1)).sqrt()
    log_p = torch.special.log_ndtr(torch.stack([margin, -margin], dim=-1))
    return _averaged(_without_ties(-labels * log_p[:, 0] - (1 - labels) * log_p[:, 1], labels), weights)


def margin_loss(
    margins: Tensor, labels: Tensor, kind: MarginLoss = "hinge", weights: Tensor | None = None, gamma: float = 5.0
) -> Tensor:
    """Losses of distances to ideal points (PAL, arXiv 2406.08469).

    With ``u`` the margin by which the preferred image is ahead: "hinge" ``max(0, 1 - u)``; "hinge_smooth" the same with
    a parabola of width ``gamma`` in place of the corner; "logistic" ``log(1 + exp(-u))``. Ties cost nothing.

    Args:
        margins: (batch,) score of the first image minus that of the second.
        labels, weights: as in :func:`preference_cross_entropy`.

    Raises:
        UserError: for an unknown kind.
    """
    sides = 2 * labels - 1
    ahead = sides * margins
    if kind == "hinge":
        losses = (1 - ahead).clamp(min=0)
    elif kind == "hinge_smooth":
        parabola = (1 - ahead).clamp(min=0).square() / (2 * gamma)
        losses = torch.where(ahead >= 1 - gamma, parabola, 1 - gamma / 2 - ahead)
    elif kind == "logistic":
        losses = F.softplus(-ahead)
    else:
        raise unknown("loss of margins", kind, get_args(MarginLoss))
    return _averaged(losses * sides.abs(), weights)


def _without_ties(losses: Tensor, labels: Tensor) -> Tensor:
    return torch.where(labels == 0.5, losses - math.log(2.0), losses)


def _averaged(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses.mean() if weights is None else (weights * losses).sum()

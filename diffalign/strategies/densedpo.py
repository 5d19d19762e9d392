"""DenseDPO's mathematics: pairs of videos with a preference for each segment of time.

Paper: Wu et al., "DenseDPO: Fine-Grained Temporal Preference Optimization for Video Diffusion Models", NeurIPS 2025,
arXiv 2506.03517. No official code is public; the formulas are the paper's.

The terms are errors kept apart by latent frame (``DenoisingKernel(frame_dim=2)``), (2 B, F). With d the policy's gain
over the reference and l the label of a segment, +1 where video 0 is better, -1 where video 1 is, 0 for a tie::

    d_f    = ref_err_f - err_f
    inside:   z   = beta mean over frames with l_f != 0 of  l_f (d0_f - d1_f)         loss = -log sigmoid(z)
    outside:  z_s = beta l_s mean over the frames of segment s of  (d0_f - d1_f)      loss = mean over l_s != 0 of
                                                                                             -log sigmoid(z_s)

"inside" is the paper's; "outside" a third party's. Videos without a labelled segment do not count. beta has no factor
0.5 here (500 in the paper, with velocity errors averaged over elements). Each video has its own noise (``own_noise``).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from diffalign.errors import unknown
from diffalign.strategies.base import LossOutput, Terms
from diffalign.strategies.heads import accuracy, preference_loss

Aggregation = Literal["inside", "outside"]


def segment_pair_loss(
    terms: Terms, labels: Tensor, frame_to_segment: Tensor, beta: float, aggregation: Aggregation = "inside"
) -> LossOutput:
    """Return the loss of pairs of videos, averaged over those with a labelled segment, and the metrics.

    Args:
        terms: errors (2 B, F) of policy and reference, first videos first.
        labels: (B, S) of segments, +1, -1 or 0.
        frame_to_segment: (F,) int64, the segment that each frame belongs to.
        beta: inverse temperature on differences of mean errors.
        aggregation: whether segments are averaged inside the sigmoid or outside.
    """
    first, second = (terms.reference - terms.policy).chunk(2)
    gain, labels = first - second, labels.to(terms.policy)
    if aggregation == "inside":
        by_frame = labels[:, frame_to_segment]
        margin = _mean(by_frame * gain, by_frame.abs())[:, None]
        counts = by_frame.abs().amax(dim=1, keepdim=True)
    elif aggregation == "outside":
        segments = torch.arange(labels.shape[1], device=labels.device)
        members = (frame_to_segment == segments[:, None]).to(gain)  # (S, F)
        margin = labels * (gain @ members.T) / members.sum(dim=1).clamp(min=1)
        counts = labels.abs()
    else:
        raise unknown("aggregation", aggregation, get_args(Aggregation))
    counted = counts.amax(dim=1)
    losses = _mean(counts * preference_loss(margin, beta), counts)
    logit = beta * margin.detach()
    metrics = {
        "loss": losses.detach(),
        "logit": _mean(counts * logit, counts),
        "implicit_accuracy": _mean(counts * accuracy(logit), counts),
        "effective_weight": _mean(counts * torch.sigmoid(-logit), counts),
        "labelled_share": counted,
    }
    return LossOutput((counted * losses).sum() / counted.sum().clamp(min=1), metrics)


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """Mean of each row (B, K) over what counts; zero where nothing does."""
    return values.sum(dim=1) / counts.sum(dim=1).clamp(min=1)

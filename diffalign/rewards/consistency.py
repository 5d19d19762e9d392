"""Ctrl-U (Zhang et al., arXiv 2410.11236; official code grenoble-zhang/Ctrl-U): dense consistency, damped in doubt.

A picture is read twice, from two adjacent noise levels, by a model with one output a pixel (a segmenter, a depth or an
edge estimator). The penalty of the first reading against the wanted map is damped by ``exp(-U)``, U the disagreement of
the two readings, and U itself is added, so that doubt is not worth seeking. Gradients pass through both readings.

Shapes: maps (batch, height, width); ``combine.UncertaintyWeighted`` is the same for rewards of one number an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.rewards.transforms import damped_penalty

IGNORED = 255
"""Label of pixels that belong to no class."""
_EPSILON = 1e-10


@dataclass(frozen=True)
class Readings:
    """What two readings of a batch say.

    Args:
        penalty: of the first reading, (batch, height, width).
        disagreement: U, (batch, height, width).
        counted: pixels whose penalty counts, (batch, height, width) bool; U counts everywhere.
    """

    penalty: Tensor
    disagreement: Tensor
    counted: Tensor

    @property
    def damping(self) -> Tensor:
        """``exp(-U)``, (batch, height, width)."""
        return torch.exp(-self.disagreement)


def read_classes(first: Tensor, second: Tensor, labels: Tensor, scale: float = 1.0) -> Readings:
    """Compare two segmentations: cross entropy, and the divergence of the second's classes from the first's.

    Args:
        first, second: logits (batch, classes, height, width); float32 or wider, or softmax overflows.
        labels: (batch, height, width) int64, :data:`IGNORED` where there is none.
        scale: factor of the divergence.
    """
    log_p, log_q = first.log_softmax(1), second.log_softmax(1)
    divergence = (log_q.exp() * (log_q - log_p)).sum(1)
    penalty = F.cross_entropy(first, labels, ignore_index=IGNORED, reduction="none")
    return Readings(penalty, scale * divergence, labels != IGNORED)


def read_values(first: Tensor, second: Tensor, labels: Tensor) -> Readings:
    """Compare two maps of numbers (depth, edges): squared error, and absolute difference.

    Args:
        first, second, labels: (batch, height, width).
    """
    return Readings((first - labels).square(), (first - second).abs(), torch.ones_like(first, dtype=torch.bool))


def damped_consistency(readings: Readings, eligible: Tensor) -> tuple[Tensor, Tensor]:
    """Average over the eligible images.

    Args:
        readings: of the batch.
        eligible: (batch,) bool; false where the noise level is too high for a clean estimate to be read.

    Returns:
        the damped penalty and the disagreement, (); both 0 where no image is eligible.
    """
    damped = damped_penalty(readings.penalty, readings.disagreement, weight=0.0) * readings.counted
    counts = readings.counted.sum((1, 2))
    penalty = damped.sum((1, 2)) / (counts + _EPSILON)
    doubt = readings.disagreement.mean((1, 2))
    total = eligible.sum() + _EPSILON
    return (eligible * penalty).sum() / total, (eligible * doubt).sum() / total


def ramp(step: int, scale: float, steps: int = 5000) -> float:
    """Weight of the penalty at a step: grows linearly to ``scale``."""
    return scale * min(1.0, step / steps)

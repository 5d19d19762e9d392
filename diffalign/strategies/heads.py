"""Losses on a logit: how strongly a preference is already satisfied becomes something to minimise.

Shared by image and text methods. A logit is a scaled margin, positive when the chosen example is ranked above the
rejected one; all functions are element-wise and keep the logit's type (float32 or wider).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.errors import unknown

Head = Literal["sigmoid", "hinge", "ipo"]


def preference_loss(
    margin: Tensor, beta: float | Tensor, head: Head = "sigmoid", label_smoothing: float = 0.0
) -> Tensor:
    """Loss of a preference margin.

    Args:
        margin: any shape, not yet scaled by ``beta``.
        beta: inverse temperature; for "ipo" the strength of regularisation (the target margin is ``1 / (2 beta)``).
        head: "sigmoid" ``-log sigmoid(beta m)``, "hinge" ``relu(1 - beta m)``, or "ipo" ``(m - 1/(2 beta))^2``.
        label_smoothing: probability that the label is wrong (conservative DPO, sigmoid head only).

    Returns:
        the losses, shaped as ``margin``.
    """
    if head == "sigmoid":
        logit = beta * margin
        return -F.logsigmoid(logit) * (1 - label_smoothing) - F.logsigmoid(-logit) * label_smoothing
    if head == "hinge":
        return torch.relu(1 - beta * margin)
    if head == "ipo":
        return (margin - 1 / (2 * beta)).square()
    raise unknown("preference head", head, get_args(Head))


def accuracy(margin: Tensor) -> Tensor:
    """Share of satisfied preferences for each margin: 1, 0, and one half for an exact tie."""
    return ((margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype)).detach()

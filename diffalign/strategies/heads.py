"""Losses on a logit: how strongly a preference is already satisfied becomes something to minimise.

Shared by image and text methods. A logit is a scaled margin, positive when the chosen example is ranked above the
rejected one; all functions are element-wise and keep the logit's type (float32 or wider).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.errors import UserError, require_at_least, unknown

Head = Literal["sigmoid", "hinge", "ipo"]


@dataclass(frozen=True)
class PairOptions:
    """What every objective on pairs offers, of images or of texts; methods add their own constants.

    Args:
        sft_weight: weight of plain fine-tuning on the chosen example, added to the loss. 0: none of the papers has it.
        rejected_gradient_scale: factor on the gradient through the rejected example; below 1 protects against a loss
            that falls only because rejected examples get ever worse. 1: the papers.
    """

    sft_weight: float = 0.0
    rejected_gradient_scale: float = 1.0

    def __post_init__(self) -> None:
        require_at_least(0, self, "sft_weight", "rejected_gradient_scale")


def check_label_smoothing(probability: float, head: str = "sigmoid") -> None:
    """Refuse a probability of wrong labels that is none, or that a head does not know.

    Raises:
        UserError: saying which.
    """
    if not 0 <= probability <= 0.5:
        raise UserError(f"label_smoothing is {probability}: expected a probability in [0, 0.5]")
    if probability and head != "sigmoid":
        raise UserError(f"label_smoothing belongs to the sigmoid head, not to {head!r}: set one or the other")


def scale_gradient(value: Tensor, scale: float | Tensor) -> Tensor:
    """Return ``value`` unchanged, with its gradient multiplied by ``scale``, one number or a tensor like ``value``."""
    if isinstance(scale, float) and scale == 1.0:
        return value
    return value.detach() + scale * (value - value.detach())


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


def accuracy(margin: Tensor, tie: float = 0.5) -> Tensor:
    """Share of satisfied preferences for each margin: 1, 0, and ``tie`` where it is exactly 0.

    Before training every pair is a tie. One half, as diffusers counts it, then says that nothing is known; TRL and the
    official code of Diffusion-DPO count 0.
    """
    return ((margin > 0).to(margin.dtype) + tie * (margin == 0).to(margin.dtype)).detach()


def differences(values: Tensor) -> Tensor:
    """Return ``[..., i, j] = values[..., i] - values[..., j]`` of (..., N) values: the margins of all ordered pairs."""
    return values[..., :, None] - values[..., None, :]

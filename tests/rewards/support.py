"""Rewards and pictures that tests can foretell."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from diffalign.rewards.base import Metadata, Reward, RewardInfo

PROMPTS = ["a photo of a red circle", "a photo of two blue squares"]


class Brightness(Reward):
    """Mean of one channel times a factor."""

    def __init__(self, channel: int = 0, factor: float = 1.0) -> None:
        self.channel, self.factor = channel, factor
        self.info = RewardInfo(f"channel{channel}", "mean pixel", (0.0, factor), differentiable=True, licence="MIT")

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        return self.factor * images[:, self.channel].mean(dim=(1, 2))


def pictures(*colours: tuple[float, float, float], side: int = 4) -> Tensor:
    """Plain pictures, (n, 3, side, side)."""
    return torch.tensor(colours).view(-1, 3, 1, 1).expand(-1, -1, side, side).clone()


def waves(count: int, height: int, width: int) -> Tensor:
    """Smooth pictures that all differ, (count, 3, height, width) in [0, 1]."""
    y, x = torch.arange(height).view(-1, 1) / height, torch.arange(width) / width
    rows = [
        torch.sin(2 * math.pi * (x * (c + 1) + y * (i + 1) + 0.1 * c * i)) * 0.4 + 0.5
        for i in range(count)
        for c in range(3)
    ]
    return torch.stack(rows).view(count, 3, height, width)


def check_gradient(reward: Reward, images: Tensor, step: float = 1e-2) -> None:
    """Compare the directional derivative with a central difference."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(images.shape, generator=generator)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(leaf, PROMPTS).sum(), leaf)
    assert gradient.isfinite().all()
    ends = [reward.score(images + sign * step * direction, PROMPTS).sum().item() for sign in (1, -1)]
    want = (ends[0] - ends[1]) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(want, rel=0.05, abs=1e-3)

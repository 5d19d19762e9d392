"""What the files of on-policy methods share: transitions of the rectified-flow SDE and the clipped loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from diffalign.diffusion.level import Level
from diffalign.strategies.advantages import PromptStatistics


def flow_levels(sigmas: Tensor, index: Tensor) -> tuple[Level, Level]:
    """Levels before and after the steps of the given indices (rows,)."""
    before, after = sigmas[index], sigmas[index + 1]
    return Level(1 - before, before), Level(1 - after, after)


def tracked(updates: list[dict[str, Any]], tracker: PromptStatistics, dtype: torch.dtype) -> list[Tensor]:
    """Advantages of successive rollouts."""
    return [tracker.update(u["prompts"], torch.tensor(u["rewards"], dtype=dtype)) for u in updates]


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    """Gradient of a scalar; the graph stays for another one."""
    return grad(value, leaf, retain_graph=True)[0]

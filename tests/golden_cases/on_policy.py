"""What the files of on-policy methods share: levels of flow steps, and the loss of transitions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from diffalign.diffusion.level import Level
from diffalign.rollouts.transitions import TransitionBatch
from diffalign.strategies.advantages import PromptStatistics

ROLLOUT = {"prompts": str, "rewards": None}
"""Kinds of what a rollout records."""


def flow_levels(sigmas: Tensor, index: Tensor) -> tuple[Level, Level]:
    """Levels before and after the steps of the given indices (rows,)."""
    before, after = sigmas[index], sigmas[index + 1]
    return Level(1 - before, before), Level(1 - after, after)


def tracked(updates: list[dict[str, Any]], tracker: PromptStatistics, dtype: torch.dtype) -> list[Tensor]:
    """Advantages of successive rollouts."""
    return [tracker.update(u["prompts"], torch.tensor(u["rewards"], dtype=dtype)) for u in updates]


def transition_batch(**fields: Tensor) -> TransitionBatch:
    """A batch of one transition a row; each field is (rows,)."""
    rows = len(next(iter(fields.values())))
    return TransitionBatch(ids=[str(row) for row in range(rows)], seeds=torch.arange(rows), fields=fields)


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    """Gradient of a scalar; the graph stays for another one."""
    return grad(value, leaf, retain_graph=True)[0]

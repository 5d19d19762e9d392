"""From rewards of sampled images to advantages: how much better than expected each one is.

Three estimators, all functions of the rewards of the whole rollout (gathered over processes):

* the rollout's own mean and deviation (DDPO without tracking, arXiv 2305.13301);
* the mean of each group, images of one caption, and the deviation of the group or of the rollout (Flow-GRPO, arXiv
  2505.05470; DanceGRPO, arXiv 2505.07818);
* running statistics of each caption over rollouts (DDPO's tracker).

Where all rewards are equal, advantages are exactly 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.errors import UserError

StdScope = Literal["group", "batch"]


def _standardised(rewards: Tensor, mean: Tensor, std: Tensor, eps: float) -> Tensor:
    return (rewards - mean) / (std + eps)


def batch_advantages(rewards: Tensor, eps: float = 1e-8, unbiased: bool = False) -> Tensor:
    """Take the mean and the deviation of all rewards out, (n,).

    Args:
        rewards: (n,) of the whole rollout.
        eps: added to the deviation. 1e-8: official code of DDPO.
        unbiased: divide squares by n - 1 instead of n.
    """
    return group_advantages(rewards, torch.zeros_like(rewards, dtype=torch.long), "group", eps, unbiased)


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    std_scope: StdScope = "batch",
    eps: float = 1e-4,
    unbiased: bool = False,
) -> Tensor:
    """Take the mean of each group out and divide by a deviation, (n,).

    Args:
        rewards: (n,) of the whole rollout.
        groups: (n,) int64, equal for the images of one caption.
        std_scope: whose deviation divides: each group's own, or that of all rewards.
        eps: added to the deviation. 1e-4: official code of Flow-GRPO (DanceGRPO 1e-8).
        unbiased: divide squares by n - 1 instead of n (DanceGRPO); a group of one image then has deviation 0.
    """
    _, index = groups.unique(return_inverse=True)
    counts = torch.bincount(index).to(rewards)
    means = torch.zeros_like(counts).index_add_(0, index, rewards) / counts
    centred = rewards - means[index]
    if std_scope == "group":
        squares = torch.zeros_like(counts).index_add_(0, index, centred.square())
        std = (squares / (counts - float(unbiased)).clamp(min=1)).sqrt()[index]
    else:
        squares = (rewards - rewards.mean()).square().sum()
        std = (squares / max(1, len(rewards) - int(unbiased))).sqrt()
    return _standardised(_exact_zeros(centred, rewards, index), torch.zeros_like(std), std, eps)


def _exact_zeros(centred: Tensor, rewards: Tensor, index: Tensor) -> Tensor:
    """Set the rounding of groups of equal rewards to 0: divided by their deviation it would be noise of size 1."""
    size = int(index.max()) + 1 if len(index) else 0
    low = rewards.new_zeros(size).scatter_reduce(0, index, rewards, "amin", include_self=False)
    high = rewards.new_zeros(size).scatter_reduce(0, index, rewards, "amax", include_self=False)
    return torch.where((low == high)[index], 0.0, centred)


def combined_advantages(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    groups: Tensor,
    *,
    renormalise: bool = False,
    eps: float = 1e-8,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Standardise every reward inside its group and only then weight and add them (Pref-GRPO, arXiv 2508.20751).

    Args:
        rewards: name -> (n,) of the whole rollout.
        weights: name -> factor, for each of them.
        groups: (n,) int64.
        renormalise: take mean and deviation of the sum over the rollout out at the end (the released scripts).
        eps: added to every deviation. 1e-8: official code.

    Returns:
        the advantages (n,), and those of each reward alone, unweighted.

    Raises:
        UserError: if rewards and weights have different names, or there are none.
    """
    if not rewards or set(rewards) != set(weights):
        raise UserError(f"rewards {sorted(rewards)} but weights for {sorted(weights)}: name the same, one at least")
    parts = {name: group_advantages(values, groups, "group", eps, unbiased=True) for name, values in rewards.items()}
    total = torch.stack([weights[name] * part for name, part in parts.items()]).sum(0)
    return (batch_advantages(total, eps, unbiased=True) if renormalise else total), parts


class PromptStatistics:
    """Running statistics of each caption's rewards over rollouts (DDPO's per-prompt tracker).

    Rewards of a rollout are entered first; a caption is then standardised by its newest ``buffer_size`` rewards, or by
    the rollout alone while it has seen fewer than ``min_count``. Every process must enter the rewards of all.

    Args:
        buffer_size: rewards remembered of a caption. 16 or 32: official configs.
        min_count: rewards a caption needs before its own statistics are used; beyond ``buffer_size``, never. 16:
            official configs.
        eps: added to the deviation. 1e-6: official code.
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16, eps: float = 1e-6) -> None:
        self._size, self._min, self._eps = buffer_size, min_count, eps
        self._buffers: dict[str, deque[float]] = {}

    def update(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """Enter the rewards of a rollout and return its advantages, (n,).

        Args:
            prompts: n captions.
            rewards: (n,).
        """
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self._buffers.setdefault(prompt, deque(maxlen=self._size)).append(reward)
        known = {prompt: self._moments(prompt) for prompt in set(prompts) if len(self._buffers[prompt]) >= self._min}
        whole = _moments(rewards.double())
        rows = [known.get(prompt, whole) for prompt in prompts]
        mean, std = torch.tensor(rows, dtype=torch.float64, device=rewards.device).reshape(-1, 2).unbind(1)
        return _standardised(rewards.double(), mean, std, self._eps).to(rewards.dtype)

    def summary(self) -> dict[str, dict[str, float]]:
        """Return mean, deviation (with its eps) and number of the remembered rewards of each caption."""
        table = {}
        for prompt, buffer in self._buffers.items():
            mean, std = self._moments(prompt)
            table[prompt] = {"mean": mean, "std": std + self._eps, "count": len(buffer)}
        return table

    def state_dict(self) -> dict[str, Any]:
        """Return the remembered rewards."""
        return {prompt: list(buffer) for prompt, buffer in self._buffers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._buffers = {prompt: deque(values, maxlen=self._size) for prompt, values in state.items()}

    def _moments(self, prompt: str) -> tuple[float, float]:
        return _moments(torch.tensor(list(self._buffers[prompt]), dtype=torch.float64))


def _moments(values: Tensor) -> tuple[float, float]:
    """Mean and population deviation."""
    return float(values.mean()), float(values.std(correction=0))

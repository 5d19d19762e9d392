"""Policy gradients whose advantages are standardised rewards: DDPO's and Flow-GRPO's idea of how good an image is.

    A = (reward - what is expected of the image) / deviation

The expectation is that of the image's caption over rollouts, of its group, or of the rollout
(:mod:`diffalign.strategies.advantages`); of several rewards the weighted sum counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rollouts.judged import Judged
from diffalign.rollouts.rollout import Rollout
from diffalign.strategies.advantages import PromptStatistics, StdScope, batch_advantages, group_advantages
from diffalign.strategies.on_policy import PolicyGradient, PolicyGradientConfig


@dataclass(frozen=True)
class StandardisedConfig(PolicyGradientConfig):
    """Constants of policy gradients on standardised rewards.

    Args:
        advantage: what is expected of an image: the mean of its caption over rollouts (once known), that of its group,
            or that of the rollout. "caption": official code of DDPO.
        advantage_std: for groups, whose deviation divides: the group's or the rollout's. "batch": Flow-GRPO's configs.
        advantage_unbiased: deviations of groups divide by n - 1 in place of n, and 1e-8 is added to them in
            the place of 1e-4. False: Flow-GRPO's code (True: DanceGRPO's).
        statistics_size: rewards remembered of each caption. 16: official configs of DDPO.
        statistics_min_count: rewards a caption needs before its own statistics count; until then the rollout's do. 16:
            official configs of DDPO.
    """

    advantage: Literal["caption", "group", "batch"] = "caption"
    advantage_std: StdScope = "batch"
    advantage_unbiased: bool = False
    statistics_size: int = 16
    statistics_min_count: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.statistics_min_count <= self.statistics_size:
            raise UserError(
                f"statistics_min_count is {self.statistics_min_count}: expected 1 to {self.statistics_size}, the "
                "statistics_size, else no caption ever has statistics of its own"
            )
        if self.advantage == "group":
            self.require_groups()


class Advantages:
    """Estimates advantages as the configuration says, and remembers what that takes.

    Args:
        config: which estimator.
    """

    def __init__(self, config: StandardisedConfig) -> None:
        self._config = config
        self._statistics = PromptStatistics(config.statistics_size, config.statistics_min_count)

    def __call__(self, rewards: Tensor, judged: Judged) -> Tensor:
        """Return advantages, (n,); 0 where a reward failed.

        Args:
            rewards: (n,) of the images of all processes.
            judged: which caption and group they are of.
        """
        valid, config = judged.valid, self._config
        advantages = torch.zeros_like(rewards)
        kept = rewards[valid]
        if config.advantage == "caption":
            advantages[valid] = self._statistics.update([str(key) for key in judged.captions[valid].tolist()], kept)
        elif config.advantage == "group":
            unbiased = config.advantage_unbiased
            eps = 1e-8 if unbiased else 1e-4
            advantages[valid] = group_advantages(kept, judged.groups[valid], config.advantage_std, eps, unbiased)
        else:
            advantages[valid] = batch_advantages(kept)
        return advantages

    def state_dict(self) -> dict[str, Any]:
        """Return the remembered rewards."""
        return self._statistics.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._statistics.load_state_dict(state)


class StandardisedRewards(PolicyGradient):
    """What DDPO and Flow-GRPO have in common; each has its constants."""

    def __init__(self, config: StandardisedConfig) -> None:
        super().__init__(config)
        self._estimator = Advantages(config)

    def advantages(self, rollout: Rollout) -> Tensor:
        """Return the standardised reward of each image of all processes, (n,); 0 where a reward failed."""
        return self._estimator(rollout.rewards, rollout.judged)

    def state_dict(self) -> dict[str, Any]:
        """Rewards of captions that the advantages remember, and what rewards remember themselves."""
        return {"advantages": self._estimator.state_dict(), **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        super().load_state_dict({name: value for name, value in state.items() if name != "advantages"})
        self._estimator.load_state_dict(state["advantages"])

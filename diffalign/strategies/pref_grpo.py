"""Pref-GRPO: the share of duels an image wins inside its group, as the reward of a group-relative policy gradient.

Paper: Wang et al., "Pref-GRPO: Pairwise Preference Reward-based GRPO for Stable Text-to-Image Reinforcement Learning",
arXiv 2508.20751. Official code: https://github.com/CodeGoat24/Pref-GRPO.

For each reward on its own, with w the share of duels that an image wins among the images of its caption::

    A    = sum over rewards of weight (w - mean of the group) / (unbiased deviation of the group)
    r    = exp( s (log-ratio + mean over elements of (mu - mu_old)^2 / (2 s^2)) )
    loss = mean over images and steps of  max(-A r, -A clamp(r, 1 - c, 1 + c)) / (-dt)

Whatever the gaps between scores, an order of eight images gives advantages below 1.43, so tiny differences are not
blown up as by the standardisation of scores. Duels are decided by scores, with a margin for ties, or by a judge of
pairs that is a reward itself. The mean share of duels is 1/2 by construction: watch the rewards themselves, which runs
report. For discrete processes the loss is not divided: their steps have no ``dt``. The code rounds shares to three
digits before it standardises them, which is not done here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from diffalign.errors import require_at_least, unknown
from diffalign.rewards.transforms import win_rates
from diffalign.rollouts.rollout import Rollout
from diffalign.strategies.advantages import combined_advantages
from diffalign.strategies.base import Context
from diffalign.strategies.on_policy import PolicyGradient, PolicyGradientConfig
from diffalign.strategies.registry import register


def group_win_rates(scores: Tensor, groups: Tensor, margin: float = 0.0) -> Tensor:
    """Return the share of duels that each image wins inside its group, (n,); duels are decided by scores.

    Args:
        scores: (n,).
        groups: (n,) int64, equal for the images of one caption.
        margin: scores no further apart are a tie.
    """
    rates = torch.empty_like(scores)
    for group in groups.unique():
        rows = groups == group
        rates[rows] = win_rates(scores[rows], margin)
    return rates


@dataclass(frozen=True)
class PrefGRPOConfig(PolicyGradientConfig):
    """Constants of Pref-GRPO.

    Args:
        images_per_prompt: images of a caption in a rollout, which meet in duels. 8: released scripts.
        rollout_steps: sampling steps. 25: released scripts.
        rollout_guidance_scale: guidance in sampling and in training. 4.5: Flow-GRPO's for SD 3.5; the scripts train
            FLUX.1-dev, whose guidance is an input.
        same_start: the images of a caption share their initial noise. True: released code.
        trained_share: share of the steps that are trained. 0.6: released code.
        train_last_step: train the step that ends at the image, too. False: released code.
        kl_form: "gaussian": released code, where the penalty is off by default.
        duel_margin: scores no further apart are a tie, so that equally good images teach nothing. 0: a duel always has
            a winner, as in the paper.
        pointwise: names of rewards that count as they are, not by duels: clip, as the released scripts mix it in, or a
            judge of pairs, such as unified_reward_pair, whose number is the share of duels already.
        renormalise: standardise the summed advantages over the rollout. True: released scripts.
        normalise_ratio: take the bias and the spread of a step's size out of the log-ratio. True: released scripts.
    """

    images_per_prompt: int = 8
    rollout_steps: int = 25
    rollout_guidance_scale: float = 4.5
    same_start: bool = True
    trained_share: float = 0.6
    train_last_step: bool = False
    kl_form: Literal["released", "gaussian"] = "gaussian"
    duel_margin: float = 0.0
    pointwise: list[str] = field(default_factory=list)
    renormalise: bool = True
    normalise_ratio: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_groups()
        require_at_least(0, self, "duel_margin")


@register(
    "pref_grpo",
    summary="group-relative policy gradient on the share of duels an image wins, not on scores",
    paper="Pref-GRPO: Pairwise Preference Reward-based GRPO for Stable Text-to-Image RL (arXiv 2508.20751)",
    repository="https://github.com/CodeGoat24/Pref-GRPO",
    family="on-policy",
)
class PrefGRPO(PolicyGradient):
    """Learns from duels among its own images."""

    spec = replace(PolicyGradient.spec, bundled_model="tiny-sd3")
    Config = PrefGRPOConfig

    def __init__(self, config: PrefGRPOConfig) -> None:
        super().__init__(config, normalise_ratio=config.normalise_ratio)

    def build(self, ctx: Context) -> None:
        """Start the scorers, and check the names of pointwise rewards."""
        super().build(ctx)
        for name in self.config.pointwise:
            if name not in ctx.rewards:
                raise unknown("reward in pointwise", name, list(ctx.rewards))

    def advantages(self, rollout: Rollout) -> Tensor:
        """Return the weighted sum of each reward's own advantages, (n,)."""
        judged, config = rollout.judged, self.config
        advantages = judged.rewards.new_zeros(len(judged.seeds))
        groups = judged.groups[judged.valid]
        rewards = {}
        for column, name in enumerate(rollout.names):
            scores = judged.rewards[judged.valid, column]
            rewards[name] = scores if name in config.pointwise else group_win_rates(scores, groups, config.duel_margin)
        weights = dict(zip(rollout.names, rollout.weights, strict=True))
        advantages[judged.valid] = combined_advantages(rewards, weights, groups, renormalise=config.renormalise)[0]
        return advantages

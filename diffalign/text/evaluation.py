"""Held-out requests, fixed seeds, exact reward: the same luck before and after a run, compared in pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.diffusion.random import derive_seed
from diffalign.evaluation.winrate import Estimate, bootstrap_mean, win_rate
from diffalign.text.policy import TextPolicy
from diffalign.text.rewards import caption_rewards
from diffalign.text.writer import draw_requests
from diffalign.world.grammar import Split

WRITER_TOKENS = 20
"""Where a caption of the bundled task is cut; a right one has at most 14 words."""
TextReward = Callable[[Sequence[str], Sequence[str]], Tensor]
"""(prompts, completions) -> (B,), higher is better."""


@dataclass(frozen=True)
class TextEvaluation:
    """Rewards of one model.

    Args:
        completions: one a prompt.
        rewards: (n,) float32.
        kinds: the category of each prompt.
    """

    completions: Sequence[str]
    rewards: Tensor
    kinds: Sequence[str]

    @property
    def mean(self) -> float:
        """Mean reward."""
        return float(self.rewards.mean())

    def by_kind(self) -> dict[str, float]:
        """Mean reward of each category, in order of first appearance."""
        rows = {kind: [i for i, k in enumerate(self.kinds) if k == kind] for kind in dict.fromkeys(self.kinds)}
        return {kind: float(self.rewards[index].mean()) for kind, index in rows.items()}


@dataclass(frozen=True)
class TextComparison:
    """One model against another on the same prompts and seeds.

    Args:
        before, after: mean rewards.
        gain: mean of the paired differences with its 95 % interval.
        win_rate: share of prompts where the second model's reward is higher, ties one half.
    """

    before: float
    after: float
    gain: Estimate
    win_rate: Estimate

    def summary(self) -> dict[str, Any]:
        """Return plain values for records."""
        return {
            "reward_before": self.before,
            "reward_after": self.after,
            "gain": [self.gain.value, self.gain.low, self.gain.high],
            "win_rate": [self.win_rate.value, self.win_rate.low, self.win_rate.high],
        }


@dataclass(frozen=True)
class TextEvaluator:
    """Completes and judges.

    Args:
        prompts: held-out prompts.
        kinds: their categories.
        seeds: (n,) int64, one a prompt.
        reward: judges completions.
        max_new_tokens: where a completion is cut.
    """

    prompts: Sequence[str]
    kinds: Sequence[str]
    seeds: Tensor
    reward: TextReward
    max_new_tokens: int = 64

    def evaluate(self, policy: TextPolicy, batch_size: int = 256) -> TextEvaluation:
        """Complete every prompt at temperature 1 with its seed; the policy stays as it is."""
        completions = policy.generate(
            self.prompts, self.seeds, max_new_tokens=self.max_new_tokens, batch_size=batch_size
        )
        return TextEvaluation(completions, self.reward(self.prompts, completions), self.kinds)


def compare_texts(before: TextEvaluation, after: TextEvaluation) -> TextComparison:
    """Compare two evaluations of the same prompts and seeds."""
    gain = bootstrap_mean((after.rewards - before.rewards)[None])
    return TextComparison(before.mean, after.mean, gain, win_rate(after.rewards, before.rewards))


def writer_evaluator(split: Split, count: int, seed: int = 0) -> TextEvaluator:
    """Build the evaluator of the bundled writing task.

    Args:
        split: "tune" for choosing hyper-parameters, "test" for reporting; what they ask for never occurs in training
            wherever the kind has room for that.
        count: number of requests.
        seed: other seeds give other requests and other luck.
    """
    drawn = draw_requests(split, count, seed)
    return TextEvaluator(
        prompts=list(drawn),
        kinds=[record.kind for record in drawn.values()],
        seeds=torch.tensor([derive_seed("writer", split, seed, index) for index in range(len(drawn))]),
        reward=caption_rewards,
        max_new_tokens=WRITER_TOKENS,
    )

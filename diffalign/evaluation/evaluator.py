"""Held-out captions, fixed seeds and rewards: the same images are drawn and scored before and after a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.evaluation.winrate import Estimate, win_rate
from diffalign.inference.generate import generate
from diffalign.policies.base import Policy
from diffalign.rewards.base import Reward


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model.

    Args:
        scores: reward -> (n,) one score a caption.
        kinds: the category of each caption.
        images: (n, 3, height, width) in [0, 1].
    """

    scores: Mapping[str, Tensor]
    kinds: Sequence[str]
    images: Tensor

    def means(self) -> dict[str, float]:
        """Mean of every reward."""
        return {name: values.mean().item() for name, values in self.scores.items()}

    def by_kind(self, reward: str) -> dict[str, float]:
        """Mean of a reward for each category, in order of first appearance."""
        rows = {kind: [i for i, k in enumerate(self.kinds) if k == kind] for kind in dict.fromkeys(self.kinds)}
        return {kind: self.scores[reward][index].mean().item() for kind, index in rows.items()}


@dataclass(frozen=True)
class ImageEvaluator:
    """Draws and scores.

    Args:
        prompts: held-out captions.
        metadata: their structured descriptions, for rewards that need them; the key "tag" names the category.
        seeds: one a caption.
        rewards: name -> reward.
        primary: the reward whose win rate is reported.
        resolution: (height, width) of the images in pixels; None for the model's own.
    """

    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]
    seeds: Sequence[int]
    rewards: Mapping[str, Reward]
    primary: str
    resolution: tuple[int, int] | None = None

    def evaluate(self, policy: Policy, num_steps: int, guidance_scale: float, batch_size: int = 64) -> Evaluation:
        """Sample every caption with its seed and score the images.

        Args:
            policy: the model with its adapter as it is now; its mode and the global generators stay as they are.
            num_steps, guidance_scale: sampling settings, the same before and after a run.
            batch_size: images sampled at once.
        """
        images = generate(
            policy,
            self.prompts,
            self.seeds,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            resolution=self.resolution,
            batch_size=batch_size,
        )
        return self.score(images)

    def score(self, images: Tensor) -> Evaluation:
        """Score images (n, 3, height, width) that were drawn for the evaluator's captions."""
        scores = {}
        with torch.no_grad():
            for name, reward in self.rewards.items():
                parts = [
                    reward.score(images[i : i + 64], self.prompts[i : i + 64], self.metadata[i : i + 64])
                    for i in range(0, len(images), 64)
                ]
                scores[name] = torch.cat(parts).cpu()
        return Evaluation(scores, [str(row.get("tag", "all")) for row in self.metadata], images)

    def compare(self, before: Evaluation, after: Evaluation) -> Estimate:
        """Win rate of ``after`` over ``before`` by the primary reward."""
        return win_rate(after.scores[self.primary], before.scores[self.primary])

"""Held-out captions, fixed seeds and rewards: the same images are drawn and scored before and after a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.data.team import Alone, Team
from diffalign.evaluation.sharing import latents_together
from diffalign.evaluation.winrate import Estimate, win_rate
from diffalign.inference.generate import decode_images
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
        return self.judge(policy, self.latents(policy, num_steps, guidance_scale, Alone(), batch_size), batch_size)

    def latents(
        self, policy: Policy, num_steps: int, guidance_scale: float, team: Team, batch_size: int = 64
    ) -> Tensor:
        """Sample every caption with its seed, all processes together; arguments as of :meth:`evaluate`.

        Returns:
            (n, channels, ...), on every process.
        """
        return latents_together(
            policy,
            self.prompts,
            self.seeds,
            team,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            resolution=self.resolution,
            batch_size=batch_size,
        )

    def judge(self, policy: Policy, latents: Tensor, batch_size: int = 64) -> Evaluation:
        """Decode latents (n, channels, ...) of the evaluator's captions, and score the images."""
        return self.score(decode_images(policy, latents, batch_size))

    def score(self, images: Tensor) -> Evaluation:
        """Score images (n, 3, height, width) that were drawn for the evaluator's captions.

        Rewards compute in their own precision, whatever mixed precision is on.
        """
        scores = {}
        with torch.no_grad(), _own_precision():
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


@contextmanager
def _own_precision() -> Iterator[None]:
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu", *([accelerator.type] if accelerator is not None else [])}
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield

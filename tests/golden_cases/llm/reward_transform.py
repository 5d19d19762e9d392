"""Log-sigmoid transformation and logical AND of rewards, as compositions of rewards make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.base import Metadata, Reward, RewardInfo
from diffalign.rewards.combine import LogSigmoid, WeightedSum
from tests.golden_cases.base import GoldenCase


class Given(Reward):
    """Scores that are known, (batch,)."""

    info = RewardInfo("given", "preference logit", (-torch.inf, torch.inf), differentiable=True)

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        return self.scores


def run(case: GoldenCase) -> dict[str, Any]:
    case.known({"rewards", "reference_reward"}, {})
    rewards, references = case.tensor("rewards").requires_grad_(), case.inputs["reference_reward"]
    parts = {str(k): LogSigmoid(Given(rewards[k]), reference) for k, reference in enumerate(references)}
    both = WeightedSum(parts, dict.fromkeys(parts, 1.0))
    images, captions = torch.zeros(rewards.shape[1], 3, 1, 1), [""] * rewards.shape[1]
    transformed, combined = both.score_parts(images, captions), both.score(images, captions)
    (gradient,) = torch.autograd.grad(combined.sum(), rewards)
    return {
        "transformed": torch.stack(list(transformed.values())),
        "combined": combined,
        "prob_all_good": combined.exp(),
        "grad_rewards_of_sum": gradient,
    }

"""Log-sigmoid transformation and logical AND of rewards."""

from __future__ import annotations

from typing import Any

import torch

from diffalign.rewards.transforms import combine_and, log_sigmoid_centred
from tests.golden_cases.base import GoldenCase


def run(case: GoldenCase) -> dict[str, Any]:
    case.known({"rewards", "reference_reward"}, {})
    rewards, references = case.tensor("rewards").requires_grad_(), case.tensor("reference_reward")
    combined = combine_and(rewards, references)
    (gradient,) = torch.autograd.grad(combined.sum(), rewards)
    return {
        "transformed": log_sigmoid_centred(rewards, references[:, None]),
        "combined": combined,
        "prob_all_good": combined.exp(),
        "grad_rewards_of_sum": gradient,
    }

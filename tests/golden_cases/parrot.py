"""Parrot: the Pareto front of a batch, the weights of its images, guidance centred on the original caption."""

from __future__ import annotations

from typing import Any

from diffalign.diffusion.guidance import centred_guidance
from diffalign.strategies.parrot import pareto_mask, selection_weights
from tests.golden_cases.base import GoldenCase


def run(case: GoldenCase) -> dict[str, Any]:
    if "rewards" in case.inputs:
        case.known({"rewards"}, {"reward_index": None})
        rewards = case.tensor("rewards")
        return {
            "non_dominated": pareto_mask(rewards).nonzero().flatten(),
            "weights_for_policy_gradient": selection_weights(rewards, case.params["reward_index"]),
        }
    case.known({"eps_original", "eps_expanded", "eps_null"}, {"w1": None, "w2": None})
    predictions = [case.tensor(f"eps_{name}") for name in ("original", "expanded", "null")]
    return {"eps_guided": centred_guidance(*predictions, case.params["w1"], case.params["w2"])}

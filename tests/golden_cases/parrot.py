"""Parrot: the Pareto front of a batch, the weights of its images, guidance centred on the original caption."""

from __future__ import annotations

from typing import Any

import torch

from diffalign.diffusion.guidance import centred_guidance
from diffalign.rollouts.judged import Judged
from diffalign.rollouts.rollout import Rollout
from diffalign.strategies.base import Terms
from diffalign.strategies.parrot import Parrot, ParrotConfig
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.on_policy import gradient, transition_batch


def run(case: GoldenCase) -> dict[str, Any]:
    if "rewards" in case.inputs:
        return _selection(case)
    case.known({"eps_original", "eps_expanded", "eps_null"}, {"w1": None, "w2": None})
    predictions = [case.tensor(f"eps_{name}") for name in ("original", "expanded", "null")]
    return {"eps_guided": centred_guidance(*predictions, case.params["w1"], case.params["w2"])}


def _selection(case: GoldenCase) -> dict[str, Any]:
    """A rollout of one caption, sampled for the case's reward, judged and scored by the method itself."""
    case.known({"rewards"}, {"reward_index": None})
    rewards = case.tensor("rewards")
    images, columns = rewards.shape
    if case.params["reward_index"] not in range(columns):
        raise ValueError(f"params.reward_index is {case.params['reward_index']}: there are {columns} rewards")
    rows, meant = torch.arange(images), torch.full((images,), case.params["reward_index"])
    judged = Judged(rows, meant, torch.zeros_like(rows), rewards, torch.ones(images, dtype=torch.bool), rows)
    rollout = Rollout(None, ["caption"], judged, tuple(map(str, range(columns))), (1.0,) * columns)
    method = Parrot(ParrotConfig(objective="score_function"))
    weights = method.weights(rollout)
    log_ratio = torch.zeros(images, 1, dtype=case.dtype, requires_grad=True)
    batch = transition_batch(advantage=method.advantages(rollout), weight=weights)
    loss = method.loss(Terms(log_ratio), {}, batch).loss
    return {
        "non_dominated": weights.nonzero().flatten(),
        "weights_for_policy_gradient": -gradient(loss, log_ratio)[:, 0],
    }

"""SmPO with the level matching of the official code, and its smoothed labels."""

from __future__ import annotations

import torch

from diffalign.strategies.smpo import SmPO, SmPOConfig, winner_probability
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.inverted import INPUTS, PARAMS, run_inverted


def run(case: GoldenCase) -> dict[str, object]:
    return _labels(case) if "ps_score_0" in case.inputs else _loss(case)


def _labels(case: GoldenCase) -> dict[str, object]:
    case.known({"ps_score_0", "ps_score_1", "ps_label_0"}, {"max_val": None, "min_val": None})
    first, second = case.tensor("ps_score_0"), case.tensor("ps_score_1")
    first_won = case.integers("ps_label_0").bool()
    if not torch.equal(first_won, first > second):
        raise ValueError("the labels do not follow the scores")
    low, high = case.params["min_val"], case.params["max_val"]
    return {"winner_probability": winner_probability(first.maximum(second), first.minimum(second), low, high)}


def _loss(case: GoldenCase) -> dict[str, object]:
    case.known(INPUTS, {**PARAMS, "winner_probability": None, "gamma": None})
    config = SmPOConfig(
        beta=case.params["beta_dpo"],
        gamma=case.params["gamma"],
        num_inversion_steps=case.params["num_inversion_steps"],
        level_matching="official",
    )
    probability = torch.tensor([case.params["winner_probability"]], dtype=case.dtype)
    gap = torch.logit(probability) * (config.score_high - config.score_low)
    scores = torch.stack([gap, torch.zeros_like(gap)], dim=1) + config.score_low
    return run_inverted(case, SmPO(config), {"scores": scores})

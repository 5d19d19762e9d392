"""ImageReward's head, its normalisation and ranking."""

from __future__ import annotations

from typing import Any

from diffalign.rewards.image_reward import normalised
from diffalign.rewards.ranking import rank_positions
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.eval.aesthetic_head import WEIGHT_FORMULA
from tests.golden_cases.eval.formula import formula_head, wave

X_FORMULA = "x.flat[k] = sin(0.0137*k + s), float64, shape (n, 768)"


def run(case: GoldenCase) -> dict[str, Any]:
    case.known({"x_formula": {X_FORMULA}, "weight_formula": {WEIGHT_FORMULA}}, {"n": None, "s": None, "keys": str})
    shift = case.params["s"]
    output = formula_head(case.params["keys"], shift)(wave((case.params["n"], 768), 0.0137, shift))
    reward = normalised(output)
    return {"mlp_out": output, "reward": reward, "rank_1_is_best": rank_positions(reward)}

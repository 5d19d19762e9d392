"""DDIM-InPO with the level matching of the official code."""

from __future__ import annotations

from diffalign.strategies.inpo import InPO, InPOConfig
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.inverted import INPUTS, PARAMS, run_inverted


def run(case: GoldenCase) -> dict[str, object]:
    case.known(INPUTS | {"step_noises"}, {**PARAMS, "inversion_eta": None})
    config = InPOConfig(
        beta=case.params["beta_dpo"],
        num_inversion_steps=case.params["num_inversion_steps"],
        inversion_eta=case.params["inversion_eta"],
        level_matching="official",
    )
    return run_inverted(case, InPO(config))

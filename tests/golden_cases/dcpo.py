"""DCPO: the pair loss under two captions."""

from __future__ import annotations

from diffalign.strategies.dcpo import DCPO, DCPOConfig
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.caption_pairs import caption_pair_values


def run(case: GoldenCase) -> dict[str, object]:
    case.known({"policy_pred", "ref_pred", "target"}, {"beta": None})
    return caption_pair_values(DCPO(DCPOConfig(beta=case.params["beta"])), case)

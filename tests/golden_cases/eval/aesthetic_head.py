"""The LAION aesthetic head on unit embeddings."""

from __future__ import annotations

from typing import Any

from diffalign.rewards.clip_model import unit
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.eval.formula import formula_head, wave

X_FORMULA = "x.flat[k] = sin(0.0137*k + s), float64, shape (n, 768) then L2-normalised per row"
WEIGHT_FORMULA = (
    "state dict keys sorted alphabetically, index i: p.flat[k] = sin(0.731*k + 0.37*i + s) * a, "
    "a = 1.5/sqrt(fan_in) for matrices and 0.1 for biases"
)


def run(case: GoldenCase) -> dict[str, Any]:
    case.known({"x_formula": {X_FORMULA}, "weight_formula": {WEIGHT_FORMULA}}, {"n": None, "s": None, "keys": str})
    shift = case.params["s"]
    embeddings = unit(wave((case.params["n"], 768), 0.0137, shift))
    return {"mlp_out": formula_head(case.params["keys"], shift)(embeddings)}

"""UniGenBench's accuracies of given judgements."""

from __future__ import annotations

from typing import Any

from diffalign.evaluation.unigenbench import as_dict, summarise
from tests.golden_cases.base import GoldenCase


def run(case: GoldenCase) -> dict[str, Any]:
    case.known({"rows"}, {})
    if odd := {key for row in case.inputs["rows"] for key in row} - {"testpoint", "result_json"}:
        raise ValueError(f"unknown keys of a row: {sorted(odd)}")
    return as_dict(summarise(case.inputs["rows"]))

"""UniGenBench's accuracies of given judgements."""

from __future__ import annotations

from typing import Any

from diffalign.evaluation.unigenbench import as_dict, summarise
from tests.golden_cases.base import GoldenCase


def run(case: GoldenCase) -> dict[str, Any]:
    case.known({"rows": {"testpoint": str, "result_json": str}}, {})
    return as_dict(summarise(case.inputs["rows"]))

"""VBench's totals, and its dynamic degree on given flow."""

from __future__ import annotations

from typing import Any

from diffalign.evaluation.vbench import dynamic_degree, summarise
from tests.golden_cases.base import GoldenCase


def run(case: GoldenCase) -> dict[str, Any]:
    if "flows" in case.inputs:
        return _flow(case)
    case.known({"raw": dict}, {})
    summary = summarise(case.inputs["raw"])
    return {"quality": summary.quality, "semantic": summary.semantic, "total": summary.total}


def _flow(case: GoldenCase) -> dict[str, Any]:
    case.known({"flows"}, {"height": None, "width": None, "frames": None})
    flows = case.tensor("flows")
    if tuple(flows.shape[-2:]) != (case.params["height"], case.params["width"]):
        raise ValueError(f"the flow has {tuple(flows.shape)}")
    motion = dynamic_degree(flows, case.params["frames"])
    return {
        "threshold": motion.threshold,
        "count_needed": motion.count_needed,
        "pair_scores": motion.pair_scores,
        "dynamic": motion.dynamic,
    }

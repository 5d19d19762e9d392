"""GenEval's verdicts on given boxes."""

from __future__ import annotations

from typing import Any

from diffalign.evaluation.geneval.verdict import Detection, Rules, judge
from tests.golden_cases.base import GoldenCase

RULES = ("threshold", "counting_threshold", "max_objects", "max_overlap", "position_threshold")
DETECTION = {"class", "box", "score", "color"}


def run(case: GoldenCase) -> dict[str, Any]:
    case.known({"detections", "metadata", "image_size"}, dict.fromkeys(RULES))
    if odd := {key for row in case.inputs["detections"] for key in row} - DETECTION:
        raise ValueError(f"unknown keys of a detection: {sorted(odd)}")
    detections = [
        Detection(row["class"], tuple(row["box"]), row["score"], row.get("color")) for row in case.inputs["detections"]
    ]
    verdict = judge(detections, case.inputs["metadata"], Rules(**case.params))
    return {
        "correct": verdict.correct,
        "kept_counts": {name: len(kept) for name, kept in verdict.kept.items()},
        "kept": {name: [[*found.box, found.score] for found in kept] for name, kept in verdict.kept.items()},
        # The official words are left out of a case where they depend on the order of a Python set.
        "reason": verdict.reason if case.expected["reason"] is not None else None,
    }

"""GenEval's verdicts on given boxes."""

from __future__ import annotations

import re
from typing import Any

from diffalign.evaluation.geneval.verdict import Detection, Rules, judge
from tests.golden_cases.base import GoldenCase

RULES = ("threshold", "counting_threshold", "max_objects", "max_overlap", "position_threshold")
DETECTION = {"class": str, "box": None, "score": None, "color": str}
ENTRY = {"class": str, "count": None, "color": str, "position": str | int}
METADATA = {"tag": str, "prompt": str, "include": ENTRY, "exclude": ENTRY}


def run(case: GoldenCase) -> dict[str, Any]:
    case.known({"detections": DETECTION, "metadata": METADATA, "image_size": None}, dict.fromkeys(RULES))
    detections = [
        Detection(row["class"], tuple(row["box"]), row["score"], row.get("color")) for row in case.inputs["detections"]
    ]
    verdict = judge(detections, case.inputs["metadata"], Rules(**case.params))
    return {
        "correct": verdict.correct,
        "kept_counts": {name: len(kept) for name, kept in verdict.kept.items()},
        "kept": {name: [[*found.box, found.score] for found in kept] for name, kept in verdict.kept.items()},
        "reason": verdict.reason if case.expected.get("reason") is not None else _unsaid(verdict.reason),
    }


def _unsaid(reason: str) -> str | None:
    """Return what a case says that leaves a reason out: the official words for colours depend on the order of a set."""
    return None if re.search(r"^expected \w.*found \d+ \w+; and", reason, re.M) else reason

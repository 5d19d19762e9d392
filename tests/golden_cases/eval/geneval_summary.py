"""GenEval's summary of given results."""

from __future__ import annotations

from typing import Any

from diffalign.evaluation.geneval.summary import summarise
from tests.golden_cases.base import GoldenCase

RESULT = {"filename": str, "tag": str, "correct": {True, False}, "metadata": str}


def run(case: GoldenCase) -> dict[str, Any]:
    case.known({"results": RESULT}, {})
    summary = summarise(case.inputs["results"])
    return {
        "total_images": summary.images,
        "total_prompts": summary.prompts,
        "pct_correct_images": percent(summary.correct_images / summary.images),
        "pct_correct_prompts": percent(summary.correct_prompts / summary.prompts),
        "tasks": {
            name: {"pct": percent(task.accuracy), "correct": task.correct, "total": task.total}
            for name, task in summary.tasks.items()
        },
        "overall": summary.overall,
    }


def percent(share: float) -> str:
    return f"{share:.2%}".removesuffix("%")

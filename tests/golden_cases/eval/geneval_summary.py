"""GenEval's summary of given results."""

from __future__ import annotations

from typing import Any

from diffalign.evaluation.geneval.summary import summarise
from tests.golden_cases.base import GoldenCase


def run(case: GoldenCase) -> dict[str, Any]:
    case.known({"results"}, {})
    summary = summarise(case.inputs["results"])
    return {
        "total_images": summary.images,
        "total_prompts": summary.prompts,
        "pct_correct_images": f"{100 * summary.correct_images / summary.images:.2f}",
        "pct_correct_prompts": f"{100 * summary.correct_prompts / summary.prompts:.2f}",
        "tasks": {
            name: {"pct": f"{100 * task.accuracy:.2f}", "correct": task.correct, "total": task.total}
            for name, task in summary.tasks.items()
        },
        "overall": summary.overall,
    }

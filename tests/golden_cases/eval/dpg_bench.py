"""DPG-Bench's score of one caption."""

from __future__ import annotations

from typing import Any

from diffalign.evaluation.dpg import category_scores, image_score
from tests.golden_cases.base import GoldenCase


def run(case: GoldenCase) -> dict[str, Any]:
    case.known({"dependency": dict, "answers_per_image": dict}, {"images": None})
    parents = {int(number): on for number, on in case.inputs["dependency"].items()}
    answers = [{int(number): text for number, text in image.items()} for image in case.inputs["answers_per_image"]]
    if len(answers) != case.params["images"]:
        raise ValueError(f"{len(answers)} images, not {case.params['images']}")
    scores = [image_score(parents, image) for image in answers]
    shares = category_scores(answers, official=True)
    return {
        "score_per_image": scores,
        "prompt_score": sum(scores) / len(scores),
        "category_scores_source": {str(number): share for number, share in shares.items()},
    }

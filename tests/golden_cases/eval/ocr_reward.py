"""The OCR reward on given pieces."""

from __future__ import annotations

from typing import Any

from diffalign.rewards.ocr import quoted, text_score
from tests.golden_cases.base import GoldenCase

ROW = {"prompt": str, "pieces": {"text": str, "confidence": None}}


def run(case: GoldenCase) -> dict[str, Any]:
    case.known({"rows": ROW}, {})
    return {"reward": [_reward(row) for row in case.inputs["rows"]]}


def _reward(row: dict[str, Any]) -> float:
    return text_score(quoted(row["prompt"]), [(piece["text"], piece["confidence"]) for piece in row["pieces"]])

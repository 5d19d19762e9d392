"""GenEval's captions, by number and hash."""

from __future__ import annotations

import hashlib
from typing import Any

from diffalign.evaluation.geneval.prompts import as_jsonl, generate_rows
from tests.golden_cases.base import GoldenCase


def run(case: GoldenCase) -> dict[str, Any]:
    case.known((), {"seed": None, "n": None, "max_count": None})
    rows = generate_rows(case.params["seed"], case.params["n"], case.params["max_count"])
    return {
        "num_prompts": len(rows),
        "sha256_of_jsonl": hashlib.sha256(as_jsonl(rows).encode()).hexdigest(),
        "first_prompts": [row["prompt"] for row in rows[:3]],
        "last_prompts": [row["prompt"] for row in rows[-3:]],
        "rows_after_80": rows[80:],
    }

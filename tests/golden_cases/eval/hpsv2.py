"""HPSv2's transform, the accuracies of rankings, the benchmark's arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from diffalign.rewards.preprocess import PadPreprocess
from diffalign.rewards.ranking import inversion_score, pair_accuracy, style_summary
from tests.golden_cases.base import GoldenCase, refuse_unknown

RANKINGS: dict[str, tuple[Any, str, str, str]] = {
    "inversion": (inversion_score, "pred_rank", "true_rank", "inversion_score"),
    "imagereward_pairs": (pair_accuracy, "pred_score", "true_rank_1_is_best", "pair_accuracy"),
}
"""Lists of rankings -> how each is scored, what of, and under which name."""


def run(case: GoldenCase) -> dict[str, Any]:
    if "image_hwc_uint8" in case.inputs:
        return _transform(case)
    return _summary(case) if "chunk" in case.params else _rankings(case)


def _transform(case: GoldenCase) -> dict[str, Any]:
    case.known({"image_hwc_uint8"}, {"image_size": None})
    picture = Image.fromarray(np.array(case.inputs["image_hwc_uint8"], dtype=np.uint8))
    return {"pixel_values_chw": PadPreprocess(case.params["image_size"]).exact([picture])[0]}


def _rankings(case: GoldenCase) -> dict[str, Any]:
    """The rankings of this case stand among its expected values; what is derived from them is computed anew."""
    case.known((), {})
    computed: dict[str, Any] = {}
    for key, (score, *names) in RANKINGS.items():
        rows = case.expected.get(key)
        if rows is not None:
            refuse_unknown(rows, dict.fromkeys(names), key)
            assert rows, f"{key}: no rankings"
            first, second, result = names
            computed[key] = [{**row, result: score(row[first], row[second])} for row in rows]
    return computed


def _summary(case: GoldenCase) -> dict[str, Any]:
    case.known(case.inputs, {"chunk": None})
    summary = style_summary(case.inputs, case.params["chunk"])
    return {
        **{f"{style}_mean": mean for style, (mean, _) in summary.styles.items()},
        **{f"{style}_std": deviation for style, (_, deviation) in summary.styles.items()},
        "average": summary.average,
    }

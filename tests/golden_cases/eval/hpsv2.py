"""HPSv2's transform, the accuracies of rankings, the benchmark's arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from diffalign.rewards.preprocess import PadPreprocess
from diffalign.rewards.ranking import inversion_score, pair_accuracy, style_summary
from tests.golden_cases.base import GoldenCase


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
    inversions, pairs = case.expected["inversion"], case.expected["imagereward_pairs"]
    return {
        "inversion": [
            {**row, "inversion_score": inversion_score(row["pred_rank"], row["true_rank"])} for row in inversions
        ],
        "imagereward_pairs": [
            {**row, "pair_accuracy": pair_accuracy(row["pred_score"], row["true_rank_1_is_best"])} for row in pairs
        ],
    }


def _summary(case: GoldenCase) -> dict[str, Any]:
    case.known(case.inputs, {"chunk": None})
    summary = style_summary(case.inputs, case.params["chunk"])
    return {
        **{f"{style}_mean": mean for style, (mean, _) in summary.styles.items()},
        **{f"{style}_std": deviation for style, (_, deviation) in summary.styles.items()},
        "average": summary.average,
    }

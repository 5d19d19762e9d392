"""T2I-CompBench's spatial score on given boxes."""

from __future__ import annotations

from typing import Any

from diffalign.evaluation.compbench import Box, SpatialRules, position_score, spatial_score
from tests.golden_cases.base import GoldenCase

BOX = dict.fromkeys(("x_min", "y_min", "x_max", "y_max"))
ROW = {"locality": str, "box1": BOX, "box2": BOX, "det_score1": None, "det_score2": None}


def run(case: GoldenCase) -> dict[str, Any]:
    case.known({"rows": ROW}, {"iou_threshold": None, "distance_threshold": None})
    rules, rows = SpatialRules(**case.params), case.inputs["rows"]
    positions = [position_score(row["locality"], _box(row["box1"]), _box(row["box2"]), rules) for row in rows]
    scores = [
        spatial_score((row["det_score1"], row["det_score2"]), position)
        for row, position in zip(rows, positions, strict=True)
    ]
    return {"position_score": positions, "final_score": scores}


def _box(record: dict[str, float]) -> Box:
    return record["x_min"], record["y_min"], record["x_max"], record["y_max"]

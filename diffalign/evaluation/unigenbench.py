"""UniGenBench (Wang et al., arXiv 2508.20751; CodeGoat24/UniGenBench): accuracy of a judge's points, by dimension."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.errors import UserError
from diffalign.evaluation.accuracy import Accuracy


@dataclass(frozen=True)
class UniGenSummary:
    """The figures of the benchmark.

    Args:
        primary: dimension before the first hyphen -> accuracy; the official key keeps its blank ("Attribute ").
        sub: full name -> accuracy.
        failed: rows whose judgement could not be read, or has another number of points.
    """

    primary: Mapping[str, Accuracy]
    sub: Mapping[str, Accuracy]
    failed: int

    @property
    def overall(self) -> float:
        """Mean of the primary accuracies."""
        return sum(part.accuracy for part in self.primary.values()) / len(self.primary)


def summarise(rows: Sequence[Mapping[str, Any]]) -> UniGenSummary:
    """Summarise judgements, one row an image.

    Args:
        rows: ``testpoint``, a list of names, and ``result_json``, an object with the list ``score``; both as lists
            and objects, or as their text in JSON or Python's spelling. Only a score of exactly 1 is met.

    Raises:
        UserError: if no row can be read.
    """
    primary: dict[str, list[bool]] = {}
    sub: dict[str, list[bool]] = {}
    failed = 0
    for row in rows:
        try:
            points = _read(row["testpoint"])
            scores = _read(row["result_json"])["score"]
            if len(points) != len(scores):
                raise ValueError("unequal numbers of points")
        except (KeyError, TypeError, ValueError, SyntaxError):
            failed += 1
            continue
        for point, score in zip(points, scores, strict=True):
            primary.setdefault(str(point).split("-")[0], []).append(score == 1)
            sub.setdefault(str(point), []).append(score == 1)
    if not sub:
        raise UserError(f"none of {len(rows)} judgements can be read: expected testpoint and result_json with score")
    return UniGenSummary(_accuracies(primary), _accuracies(sub), failed)


def _read(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return ast.literal_eval(value)


def _accuracies(points: Mapping[str, Sequence[bool]]) -> dict[str, Accuracy]:
    return {name: Accuracy(sum(met), len(met)) for name, met in points.items()}


def as_dict(summary: UniGenSummary) -> dict[str, Any]:
    """Return what summary files hold."""

    def table(parts: Mapping[str, Accuracy]) -> dict[str, Any]:
        return {
            name: {"correct": part.correct, "total": part.total, "accuracy": part.accuracy}
            for name, part in parts.items()
        }

    return {
        "overall": summary.overall,
        "overall_rule": "mean of the primary dimensions",
        "primary_dimensions": table(summary.primary),
        "sub_dimensions": table(summary.sub),
        "failed_rows": summary.failed,
    }

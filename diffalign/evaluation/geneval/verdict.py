"""GenEval's verdict on one picture, from what a detector found in it. Pure functions; y grows downwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.evaluation.geneval.vocabulary import CLASSES, COLORS, RELATIONS

Box = tuple[float, float, float, float]
_NEAR = 1e-3
"""Offsets below this many pixels are none."""


@dataclass(frozen=True)
class Detection:
    """An object that a detector found.

    Args:
        name: its class, in GenEval's spelling.
        box: (left, top, right, bottom) in pixels.
        score: the detector's confidence, in [0, 1].
        color: where the detector itself knows it.
        mask: (height, width), true on the object; for colours judged from the picture.
    """

    name: str
    box: Box
    score: float
    color: str | None = None
    mask: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Rules:
    """Constants of the verdict; defaults are those of the official ``evaluate_images.py``.

    Args:
        threshold: scores above it count.
        counting_threshold: the same for captions of the task "counting".
        max_objects: objects kept of a class, the best first.
        max_overlap: intersection over union from which the lesser of two boxes of a class is dropped; 1 keeps all.
        position_threshold: share of the two sizes by which centres must differ to count as apart.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1


@dataclass(frozen=True)
class Verdict:
    """What is said of a picture.

    Args:
        correct: every clause of the caption holds.
        reason: the clauses that do not, one a line, in the official words.
        kept: class -> its objects that counted, the best first; classes in COCO's order, then others.
    """

    correct: bool
    reason: str
    kept: Mapping[str, Sequence[Detection]]


ColorNamer = Callable[[Sequence[Detection], str], Sequence[str]]
"""(objects of a class, the class) -> one colour each."""


def known_colors(objects: Sequence[Detection], name: str) -> list[str]:
    """Name the colours that the detector itself gave; "" where it gave none."""
    return [found.color or "" for found in objects]


def judge(
    detections: Sequence[Detection],
    metadata: Mapping[str, Any],
    rules: Rules | None = None,
    colors: ColorNamer = known_colors,
) -> Verdict:
    """Judge a picture.

    Args:
        detections: everything found, in any order.
        metadata: row of the caption: tag, include, perhaps exclude.
        rules: constants; the official ones by default.
        colors: names the colours of objects; asked only where the caption says one.
    """
    rules = rules or Rules()
    kept = keep(detections, counting=metadata["tag"] == "counting", rules=rules)
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", []):
        reason = _unmet(clause, kept, matched, rules, colors)
        matched.append(None if reason else kept.get(clause["class"], [])[: clause["count"]])
        if reason:
            reasons.append(reason)
    for clause in metadata.get("exclude", []):
        name, found = clause["class"], len(kept.get(clause["class"], []))
        if found >= clause["count"]:
            reasons.append(f"expected {name}<{clause['count']}, found {found}")
    return Verdict(not reasons, "\n".join(reasons), kept)


def keep(detections: Sequence[Detection], counting: bool, rules: Rules) -> dict[str, list[Detection]]:
    """Choose the objects that count, class by class: confident enough, the best first, perhaps without overlaps."""
    least = rules.counting_threshold if counting else rules.threshold
    names = {found.name for found in detections}
    kept: dict[str, list[Detection]] = {}
    for name in [*(c for c in CLASSES if c in names), *sorted(names - set(CLASSES))]:
        # Of equal scores the later comes first, as in the official reversed sort.
        ordered = sorted((d for d in detections if d.name == name), key=lambda d: d.score)[::-1]
        rest = [found for found in ordered if found.score > least][: rules.max_objects]
        chosen: list[Detection] = []
        while rest:
            best, *rest = rest
            chosen.append(best)
            if rules.max_overlap < 1:
                rest = [found for found in rest if overlap(best.box, found.box) < rules.max_overlap]
        if chosen:
            kept[name] = chosen
    return kept


def overlap(first: Box, second: Box) -> float:
    """Intersection over union of two boxes, whose last row and column of pixels belong to them."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0.0) * max(bottom - top + 1, 0.0)

    (a, b, c, d), (e, f, g, h) = first, second
    common = area(max(a, e), max(b, f), min(c, g), min(d, h))
    union = area(*first) + area(*second) - common
    return common / union if union else 0.0


def relations(placed: Box, anchor: Box, position_threshold: float = Rules.position_threshold) -> list[str]:
    """Say where a box lies relative to another: none, one, or two of "left of", "right of", "above", "below".

    Args:
        placed, anchor: the boxes.
        position_threshold: see :class:`Rules`.
    """
    offsets, apart = [], []
    for axis in (0, 1):
        offset = (placed[axis] + placed[axis + 2]) / 2 - (anchor[axis] + anchor[axis + 2]) / 2
        sizes = abs(placed[axis + 2] - placed[axis]) + abs(anchor[axis + 2] - anchor[axis])
        offsets.append(offset)
        apart.append(math.copysign(max(abs(offset) - position_threshold * sizes, 0.0), offset))
    if all(abs(value) < _NEAR for value in apart):
        return []
    dx, dy = (value / math.hypot(*offsets) for value in apart)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return [relation for relation in RELATIONS if holds[relation]]


def _unmet(
    clause: Mapping[str, Any],
    kept: Mapping[str, Sequence[Detection]],
    matched: Sequence[Sequence[Detection] | None],
    rules: Rules,
    colors: ColorNamer,
) -> str:
    """Return why a clause does not hold; "" where it does."""
    name, count = clause["class"], clause["count"]
    found = kept.get(name, [])[:count]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in clause and (reason := _wrong_color(found, clause, list(colors(found, name)))):
        return reason
    if "position" not in clause:
        return ""
    relation, target = clause["position"]
    anchors = matched[target]
    if anchors is None:
        return f"no target for {name} to be {relation}"
    for placed in found:
        for anchor in anchors:
            true = relations(placed.box, anchor.box, rules.position_threshold)
            if relation not in true:
                return f"expected {name} {relation} target, found {' and '.join(true)} target"
    return ""


def _wrong_color(found: Sequence[Detection], clause: Mapping[str, Any], named: list[str]) -> str:
    """Return what is said where fewer than ``count`` objects have the colour; "" where enough have it."""
    wanted, count = clause["color"], clause["count"]
    if named.count(wanted) >= count:
        return ""
    others = dict.fromkeys([*(color for color in COLORS if color in named), *named])
    seen = ", ".join(f"{named.count(color)} {color}" for color in others if color)
    return f"expected {wanted} {clause['class']}>={count}, found {named.count(wanted)} {wanted}; and {seen}"

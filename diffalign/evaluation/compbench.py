"""T2I-CompBench (Huang et al., arXiv 2307.06350; Karine-Huang/T2I-CompBench, MIT): the arithmetic of its scores."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.evaluation.geneval.detectors import Detector
from diffalign.rewards.scoring import open_picture

PHRASES = (
    "on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of",
    "on top of",
)  # fmt: skip
"""Localities in the order in which the official script looks for them."""
_BESIDE = ("next to", "on side of", "near")
_PERSONS = ("girl", "boy", "man", "woman")
OFFICIAL_SIDE = 512
"""Pixels of the pictures that distances are meant for."""
_NUMBERED = re.compile(r"_\d{6}$")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class SpatialRules:
    """Constants of the spatial score.

    Args:
        iou_threshold: overlap from which a relation counts less.
        distance_threshold: pixels within which objects are beside each other, in pictures of 512.
    """

    iou_threshold: float = 0.1
    distance_threshold: float = 150.0

    def scaled(self, side: int) -> SpatialRules:
        """Return the rules for pictures of another side."""
        return SpatialRules(self.iou_threshold, self.distance_threshold * side / OFFICIAL_SIDE)


def overlap(first: Box, second: Box) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = max(0.0, min(first[2], second[2]) - max(first[0], second[0]))
    height = max(0.0, min(first[3], second[3]) - max(first[1], second[1]))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    union = areas - width * height
    return width * height / union if union else 0.0


def position_score(locality: str, first: Box, second: Box, rules: SpatialRules | None = None) -> float:
    """Score the place of the first object relative to the second, in [0, 1].

    Args:
        locality: one of :data:`PHRASES`; "on top of" has no rule in the official script and scores 0.
        first, second: boxes (left, top, right, bottom) in pixels.
        rules: constants; the official ones by default.

    Raises:
        UserError: for another locality.
    """
    rules = rules or SpatialRules()
    if locality not in PHRASES:
        raise UserError(f"unknown locality {locality!r}; known: {', '.join(PHRASES)}")
    dx = (second[0] + second[2] - first[0] - first[2]) / 2
    dy = (second[1] + second[3] - first[1] - first[3]) / 2
    if locality in _BESIDE:
        near = abs(dx) < rules.distance_threshold or abs(dy) < rules.distance_threshold
        return 1.0 if near else rules.distance_threshold / max(abs(dx), abs(dy))
    wide, high = abs(dx) > abs(dy), abs(dy) > abs(dx)
    holds = {
        "on the left of": wide and dx > 0,
        "on the right of": wide and dx < 0,
        "on the top of": high and dy > 0,
        "on the bottom of": high and dy < 0,
    }
    if not holds.get(locality, False):
        return 0.0
    shared = overlap(first, second)
    return 1.0 if shared < rules.iou_threshold else rules.iou_threshold / shared


def spatial_score(confidences: Sequence[float], position: float) -> float:
    """Combine detection and place: 0, or between 0.5 and 1.

    Args:
        confidences: of the objects that were found: two, one or none.
        position: of :func:`position_score`; not looked at unless both were found.
    """
    score = 0.25 * sum(confidences) + (0.5 * position if len(confidences) == 2 else 0.0)
    return score if score >= 0.5 else 0.0


def spatial_parts(prompt: str) -> tuple[str, str, str]:
    """Take a caption such as "a dog on the left of a chair" apart: (first noun, locality, last noun).

    The official script takes the nouns from a parser; here they are what stands before and after the locality, articles
    and verbs aside. Girls, boys, men and women are persons.

    Raises:
        UserError: if the caption names no locality.
    """
    text = " ".join(prompt.lower().strip(" .").split())
    phrase = next((phrase for phrase in PHRASES if phrase in text), None)
    if phrase is None:
        raise UserError(f"no locality in the caption {prompt!r}; known: {', '.join(PHRASES)}")
    before, _, after = text.partition(phrase)
    return _noun(before), phrase, _noun(after)


def _noun(words: str) -> str:
    left = [word for word in words.replace(",", " ").split() if word not in ("a", "an", "the", "is", "are")]
    noun = " ".join(left)
    return "person" if noun in _PERSONS else noun


def spatial_rows(folder: Path, detector: Detector, least_confidence: float = 0.0) -> list[dict[str, Any]]:
    """Score the pictures of a folder, called ``CAPTION_000000.png``.

    Args:
        folder: with its subfolders.
        detector: finds the objects; of several of one name the most confident counts.
        least_confidence: detections below it are not looked at.

    Returns:
        image, prompt, found (how many of the two objects), position, score; one row a picture, by running number.

    Raises:
        UserError: if there are no such pictures, one cannot be read, or its caption names no locality.
    """
    paths = [path for path in folder.rglob("*.png") if _NUMBERED.search(path.stem)] if folder.is_dir() else []
    if not paths:
        raise UserError(f"no pictures called CAPTION_000000.png in {folder}")
    rows = []
    for path in sorted(paths, key=lambda path: path.stem[-6:]):
        picture, prompt, place = open_picture(path), path.stem[:-7], path.relative_to(folder).as_posix()
        first, locality, second = spatial_parts(prompt)
        found = [d for d in detector.detect(picture, place) if d.score >= least_confidence]
        named = [[d for d in found if d.name == name] for name in (first, second)]
        seen = [max(group, key=lambda d: d.score) for group in named if group]
        position = 0.0
        if len(seen) == 2:
            position = position_score(locality, seen[0].box, seen[1].box, SpatialRules().scaled(max(picture.size)))
        score = spatial_score([detection.score for detection in seen], position)
        rows.append({"image": place, "prompt": prompt, "found": len(seen), "position": position, "score": score})
    return rows


def attribute_score(probabilities: Sequence[float]) -> float:
    """Product of the probabilities of a yes to each noun phrase (BLIP-VQA, disentangled); 1 without phrases."""
    product = 1.0
    for probability in probabilities:
        product *= probability
    return product


def complex_score(parts: Mapping[str, float], spatial: bool, action: bool) -> float:
    """Mean of what applies to a complex caption ("3-in-1").

    Args:
        parts: "attribute", "spatial", "action" (CLIP) -> score.
        spatial, action: the caption is in ``complex_val_spatial.txt``, in ``complex_val_action.txt``; in neither, all
            three count.
    """
    names = (
        ["attribute", "spatial"]
        if spatial
        else ["attribute", "action"]
        if action
        else ["attribute", "spatial", "action"]
    )
    return sum(parts[name] for name in names) / len(names)

"""The bundled world's exact verifier: objects, colours, counts and positions by image analysis, no network.

Objects are connected regions that differ from the ground. A region's colour is the nearest palette colour of its inner
pixels; its shape the template (at the region's own size) with the largest overlap. A region that is neither of one
colour nor close to one template is *unclean*, and no strict verdict passes with one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from diffalign.world.grammar import COLORS, SHAPES
from diffalign.world.render import PALETTE, offsets, outline

TEMPLATE_SIDE = 24
GROUND_DISTANCE = 55
"""Levels (of 255) by which some channel of an object's pixel differs from the ground."""
MIN_AREA = 12
MIN_EXTENT = 8.0
MIN_OVERLAP = 0.70
MIN_LEAD = 0.04
"""Overlap by which the best template must lead the second."""
MIN_PURITY = 0.8

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
_COLORS = np.array([PALETTE[color] for color in COLORS], np.float32)


@dataclass(frozen=True)
class Detection:
    """An object found in a picture.

    Args:
        shape, color: names from the grammar.
        box: (left, top, right, bottom) in pixels.
        score: overlap with the shape's template, in [0, 1].
        clean: of one colour and clearly one shape.
    """

    shape: str
    color: str
    box: tuple[float, float, float, float]
    score: float
    clean: bool

    @property
    def center(self) -> tuple[float, float]:
        """Middle of the box."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Verdict:
    """What the verifier says of a picture.

    Args:
        correct: everything asked for is there, nothing else, all of it clean.
        graded: share of satisfied atomic checks, in [0, 1].
        checks: name of the check -> satisfied.
        reason: the failed checks in words; empty when correct.
    """

    correct: bool
    graded: float
    checks: Mapping[str, bool] = field(default_factory=dict)
    reason: str = ""


def verify(image: NDArray[np.uint8], metadata: Mapping[str, Any]) -> Verdict:
    """Judge a picture.

    Args:
        image: (height, width, 3), uint8.
        metadata: GenEval's row of the caption.
    """
    found = detect(image)
    checks: dict[str, bool] = {}
    total = 0
    groups: list[list[Detection]] = []
    for row in metadata["include"]:
        shape, count, color = row["class"], row["count"], row.get("color")
        group = [d for d in found if d.shape == shape]
        groups.append(group)
        total += count
        checks[f"{count} {shape}"] = len(group) == count
        if color:
            checks[f"{color} {shape}"] = bool(group) and all(d.color == color for d in group)
        if "position" in row:
            relation, target = row["position"]
            anchor = groups[target]
            holds = len(group) == len(anchor) == 1 and _holds(group[0], anchor[0], relation)
            checks[f"{shape} {relation} {metadata['include'][target]['class']}"] = holds
    checks["nothing else"] = len(found) == total
    checks["clean shapes"] = bool(found) and all(d.clean for d in found)
    failed = [name for name, satisfied in checks.items() if not satisfied]
    reason = f"not satisfied: {', '.join(failed)}" if failed else ""
    return Verdict(not failed, 1 - len(failed) / len(checks), checks, reason)


def _holds(placed: Detection, anchor: Detection, relation: str) -> bool:
    along, across = offsets(placed.center, anchor.center, relation)
    return along > across and along > MIN_EXTENT


def detect(image: NDArray[np.uint8]) -> list[Detection]:
    """Find all objects of a picture (height, width, 3), uint8."""
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    mask = np.abs(pixels - ground).max(-1) > GROUND_DISTANCE
    found = [_describe(pixels, ground, region) for region in _regions(mask)]
    return [detection for detection in found if detection is not None]


def _regions(mask: Mask) -> list[Mask]:
    """Split a mask into its 4-connected regions, dropping specks."""
    height, width = mask.shape
    todo = mask.copy()
    regions = []
    for y, x in np.argwhere(mask):
        if not todo[y, x]:
            continue
        todo[y, x] = False
        stack, members = [(int(y), int(x))], []
        while stack:
            a, b = stack.pop()
            members.append((a, b))
            for c, d in ((a - 1, b), (a + 1, b), (a, b - 1), (a, b + 1)):
                if 0 <= c < height and 0 <= d < width and todo[c, d]:
                    todo[c, d] = False
                    stack.append((c, d))
        if len(members) >= MIN_AREA:
            region = np.zeros_like(mask)
            region[tuple(np.array(members).T)] = True
            regions.append(region)
    return regions


def _describe(pixels: Floats, ground: Floats, region: Mask) -> Detection | None:
    """Measure colour, box and shape of a region; None where it is too thin to have a shape."""
    inner = region & _neighbours(region, all_of=True)
    core = pixels[inner if inner.sum() >= 8 else region]
    votes = np.bincount(((core[:, None] - _COLORS) ** 2).sum(-1).argmin(1), minlength=len(COLORS))
    purity = float(votes.max() / votes.sum())
    coverage = _coverage(pixels, ground, np.median(core, axis=0), region)
    box = _box(coverage)
    if box is None:
        return None
    overlaps = _overlaps(coverage, box)
    best = int(overlaps.argmax())
    lead = float(overlaps[best] - np.partition(overlaps, -2)[-2])
    large = min(box[2] - box[0], box[3] - box[1]) > MIN_EXTENT
    clean = purity > MIN_PURITY and overlaps[best] > MIN_OVERLAP and lead > MIN_LEAD and large
    return Detection(SHAPES[best], COLORS[int(votes.argmax())], box, float(overlaps[best]), bool(clean))


def _neighbours(region: Mask, all_of: bool) -> Mask:
    """Where all (or any) of the four neighbours belong to the region."""
    padded = np.pad(region, 1)
    sides = np.stack([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
    result: Mask = np.all(sides, axis=0) if all_of else np.any(sides, axis=0)
    return result


def _coverage(pixels: Floats, ground: Floats, color: Floats, region: Mask) -> Floats:
    """How much of each pixel the object covers, from the channel that tells it best from the ground."""
    channel = int(np.abs(color - ground).argmax())
    share = (pixels[..., channel] - ground[channel]) / (color[channel] - ground[channel] + 1e-6)
    near = region | _neighbours(region, all_of=False)
    return np.where(near, share.clip(0, 1), 0).astype(np.float32)


def _box(coverage: Floats) -> tuple[float, float, float, float] | None:
    """Sub-pixel bounding box."""
    edges = []
    for axis in (0, 1):
        profile = coverage.max(axis)
        inside = np.nonzero(profile > 0.5)[0]
        if len(inside) < 3:
            return None
        first, last = int(inside[0]), int(inside[-1])
        before = profile[first - 1] if first > 0 else 0.0
        after = profile[last + 1] if last + 1 < len(profile) else 0.0
        edges.append((first - float(before), last + 1 + float(after)))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def _overlaps(coverage: Floats, box: Sequence[float]) -> Floats:
    """Intersection over union with every template, discounted where the proportions differ."""
    templates, aspects = _templates()
    size = (TEMPLATE_SIDE, TEMPLATE_SIDE)
    image = Image.fromarray(coverage)
    crop = np.asarray(image.transform(size, Image.Transform.EXTENT, tuple(box), Image.Resampling.BILINEAR))
    union = np.maximum(crop, templates).sum((1, 2))
    aspect = (box[2] - box[0]) / (box[3] - box[1])
    return np.minimum(crop, templates).sum((1, 2)) / union * np.exp(-np.abs(np.log(aspect / aspects)))


@functools.cache
def _templates() -> tuple[Floats, Floats]:
    """Coverage of every shape in its own box, (shapes, side, side), and width over height, (shapes,)."""
    fine = TEMPLATE_SIDE * 8
    masks, aspects = [], []
    for shape in SHAPES:
        points = np.array(outline(shape, (0.0, 0.0), 1.0))
        low, high = points.min(0), points.max(0)
        image = Image.new("L", (fine, fine))
        ImageDraw.Draw(image).polygon([tuple(p) for p in (points - low) / (high - low) * fine], fill=255)
        small = image.resize((TEMPLATE_SIDE, TEMPLATE_SIDE), Image.Resampling.BOX)
        masks.append(np.asarray(small, dtype=np.float32) / 255)
        aspects.append(math.fabs((high - low)[0] / (high - low)[1]))
    return np.stack(masks), np.array(aspects, np.float32)

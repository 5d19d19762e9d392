"""Pictures of the bundled world: anti-aliased coloured shapes, well apart, on a plain light ground, 64 x 64 pixels."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from diffalign.world.grammar import COLORS

SIDE = 64
SUPERSAMPLING = 4
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "orange": (245, 140, 20),
    "yellow": (240, 220, 30),
    "green": (40, 160, 50),
    "cyan": (40, 200, 215),
    "blue": (40, 70, 220),
    "purple": (140, 40, 180),
}
COLOR_JITTER = 10
GROUND = (225, 250)
RADII = {1: (11.0, 17.0), 2: (9.5, 13.0), 3: (8.5, 10.5), 4: (8.0, 10.0)}
"""Radius range in pixels by the number of objects in the picture."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Placed:
    """One object of a scene: shape, colour, centre and radius in pixels."""

    shape: str
    color: str
    center: Point
    radius: float


def outline(shape: str, center: Point, radius: float) -> list[Point]:
    """Return the polygon of a shape; no coordinate is further than 1.1 radii from the centre."""
    x, y = center
    if shape == "circle":
        angles = [2 * math.pi * k / 40 for k in range(40)]
        return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
    if shape == "star":
        tips = [(radius * (1.1 if k % 2 == 0 else 0.45), k * math.pi / 5) for k in range(10)]
        return [(x + r * math.sin(a), y - r * math.cos(a)) for r, a in tips]
    return [(x + radius * dx, y + radius * dy) for dx, dy in _CORNERS[shape]]


_ARM = 0.36
_CORNERS: dict[str, list[Point]] = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)],
    "diamond": [(0.0, -1.1), (0.72, 0.0), (0.0, 1.1), (-0.72, 0.0)],
    "cross": [
        (-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM),
        (_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip


def arrange(metadata: Mapping[str, Any], rng: random.Random) -> list[Placed]:
    """Place the objects that a caption asks for: apart from each other, inside the frame, relation clear.

    Args:
        metadata: GenEval's row; colours that it leaves open are drawn.
        rng: source of all chance.
    """
    wanted = [(row["class"], row.get("color")) for row in metadata["include"] for _ in range(row["count"])]
    colors = [color or rng.choice(COLORS) for _, color in wanted]
    relation = next((row["position"][0] for row in metadata["include"] if "position" in row), None)
    low, high = RADII[len(wanted)]
    while True:
        radii = [rng.uniform(low, high) for _ in wanted]
        bounds = [(1.1 * r + 2, SIDE - 2 - 1.1 * r) for r in radii]
        centers = [(rng.uniform(*b), rng.uniform(*b)) for b in bounds]
        if _apart(centers, radii) and (relation is None or _related(centers[1], centers[0], relation)):
            names = [shape for shape, _ in wanted]
            return [Placed(*row) for row in zip(names, colors, centers, radii, strict=True)]


def _apart(centers: list[Point], radii: list[float]) -> bool:
    return all(
        math.dist(centers[i], centers[j]) >= 1.12 * (radii[i] + radii[j]) + 2
        for i in range(len(centers))
        for j in range(i)
    )


def _related(placed: Point, anchor: Point, relation: str) -> bool:
    along, across = offsets(placed, anchor, relation)
    return along >= 18 and along >= 1.4 * across


def offsets(placed: Point, anchor: Point, relation: str) -> Point:
    """Return how far an object lies from the anchor in the relation's direction, and how far across it, in pixels."""
    dx, dy = placed[0] - anchor[0], placed[1] - anchor[1]
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    return along, abs(dy) if relation in {"left of", "right of"} else abs(dx)


def render(metadata: Mapping[str, Any], rng: random.Random) -> NDArray[np.uint8]:
    """Draw a picture that a caption describes truly, (64, 64, 3)."""
    return draw_scene(arrange(metadata, rng), rng)


def draw_scene(scene: list[Placed], rng: random.Random) -> NDArray[np.uint8]:
    """Draw placed objects on a ground of random shade, (64, 64, 3)."""
    ground = rng.randint(*GROUND)
    image = Image.new("RGB", (SIDE * SUPERSAMPLING, SIDE * SUPERSAMPLING), (ground, ground, ground))
    canvas = ImageDraw.Draw(image)
    for item in scene:
        shade = tuple(int(min(255, max(0, v + rng.uniform(-COLOR_JITTER, COLOR_JITTER)))) for v in PALETTE[item.color])
        points = [(px * SUPERSAMPLING, py * SUPERSAMPLING) for px, py in outline(item.shape, item.center, item.radius)]
        canvas.polygon(points, fill=shade)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))

"""The renderer: repeatable, plain at its border, objects apart."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from diffalign.world.grammar import KINDS, SHAPES, draw_prompt
from diffalign.world.render import SIDE, arrange, outline, render


def records_of(kind, count=5):
    rng = random.Random(kind)
    found = []
    while len(found) < count:
        record = draw_prompt("train", rng)
        if record.kind == kind:
            found.append(record)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_picture(kind):
    for record in records_of(kind):
        first, second, other = (render(record.metadata, random.Random(seed)) for seed in (3, 3, 4))
        assert first.shape == (SIDE, SIDE, 3)
        assert first.dtype == np.uint8
        assert np.array_equal(first, second)
        assert not np.array_equal(first, other)


@pytest.mark.parametrize("kind", KINDS)
def test_objects_are_those_asked_for_and_lie_apart_inside_the_frame(kind):
    for record in records_of(kind):
        scene = arrange(record.metadata, random.Random(5))
        wanted = sorted(row["class"] for row in record.metadata["include"] for _ in range(row["count"]))
        assert sorted(item.shape for item in scene) == wanted
        for index, item in enumerate(scene):
            assert all(1.1 * item.radius < c < SIDE - 1.1 * item.radius for c in item.center)
            for other in scene[:index]:
                assert math.dist(item.center, other.center) > item.radius + other.radius


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_lie_within_their_radius(shape):
    points = outline(shape, (7.0, 9.0), 5.0)
    assert max(max(abs(x - 7.0), abs(y - 9.0)) for x, y in points) <= 1.1 * 5.0 + 1e-9


def test_the_border_is_plain_ground():
    for kind in KINDS:
        picture = render(records_of(kind, 1)[0].metadata, random.Random(0))
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (border == border[0]).all()

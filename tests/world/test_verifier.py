"""The verifier's own error, on true renderings and on renderings with one planted error."""

from __future__ import annotations

import random

import numpy as np
import pytest

from diffalign.world.grammar import KINDS, draw_prompt, prompts
from diffalign.world.render import PALETTE, SIDE, Placed, draw_scene, render
from diffalign.world.verifier import detect, verify
from train_scripts.world.spoiled import spoil_meaning


def scene(*items):
    placed = [Placed(shape, color, center, radius) for shape, color, center, radius in items]
    return draw_scene(placed, random.Random(0))


RED_CIRCLE = ("circle", "red", (18.0, 20.0), 10.0)
BLUE_STAR = ("star", "blue", (45.0, 44.0), 11.0)
BOTH = {
    "tag": "color_attr",
    "include": [{"class": "circle", "count": 1, "color": "red"}, {"class": "star", "count": 1, "color": "blue"}],
}


def test_true_renderings_are_accepted():
    rng = random.Random("true")
    records = prompts("test", 600, 7)
    accepted = [verify(render(record.metadata, rng), record.metadata).correct for record in records]
    assert np.mean(accepted) >= 0.995


def test_planted_errors_are_rejected():
    rng = random.Random("planted")
    records = prompts("test", 600, 8)
    rejected = [
        not verify(render(spoil_meaning(record.metadata, rng), rng), record.metadata).correct for record in records
    ]
    assert np.mean(rejected) >= 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_graded_score_falls_with_an_error_and_stays_in_range(kind):
    rng = random.Random(kind)
    record = next(r for r in iter(lambda: draw_prompt("test", rng), None) if r.kind == kind)
    right = verify(render(record.metadata, rng), record.metadata)
    wrong = verify(render(spoil_meaning(record.metadata, rng), rng), record.metadata)
    assert right.graded == 1.0
    assert 0.0 <= wrong.graded < 1.0
    assert wrong.reason


def test_detections_tell_shape_colour_and_box():
    found = sorted(detect(scene(RED_CIRCLE, BLUE_STAR)), key=lambda d: d.shape)
    assert [(d.shape, d.color, d.clean) for d in found] == [("circle", "red", True), ("star", "blue", True)]
    assert found[0].box == pytest.approx((8.0, 10.0, 28.0, 30.0), abs=0.6)


def test_extra_objects_fail():
    extra = ("square", "green", (48.0, 14.0), 8.0)
    assert verify(scene(RED_CIRCLE, BLUE_STAR), BOTH).correct
    verdict = verify(scene(RED_CIRCLE, BLUE_STAR, extra), BOTH)
    assert not verdict.correct
    assert "nothing else" in verdict.reason


def test_swapped_colours_fail():
    swapped = scene(("circle", "blue", *RED_CIRCLE[2:]), ("star", "red", *BLUE_STAR[2:]))
    verdict = verify(swapped, BOTH)
    assert not verdict.correct
    assert not verdict.checks["red circle"]


def test_counts_are_exact_and_swapping_places_swaps_the_relation():
    three = [("diamond", "cyan", (14.0 + 18 * k, 14.0 + 16 * k), 9.0) for k in range(3)]
    for count in (2, 3, 4):
        metadata = {"tag": "counting", "include": [{"class": "diamond", "count": count}]}
        assert verify(scene(*three), metadata).correct == (count == 3)
    left = ("cross", "green", (14.0, 32.0), 10.0)
    right = ("square", "orange", (48.0, 33.0), 10.0)
    for relation, expected in {"left of": True, "right of": False, "above": False, "below": False}.items():
        include = [{"class": "square", "count": 1}, {"class": "cross", "count": 1, "position": [relation, 0]}]
        assert verify(scene(left, right), {"tag": "position", "include": include}).correct == expected


@pytest.mark.parametrize("level", [0, 128, 255])
def test_empty_pictures_hold_nothing(level):
    blank = np.full((SIDE, SIDE, 3), level, np.uint8)
    assert detect(blank) == []
    assert not verify(blank, BOTH).correct


def test_touching_objects_are_not_clean():
    touching = scene(("circle", "red", (24.0, 32.0), 10.0), ("square", "red", (40.0, 32.0), 10.0))
    assert not any(d.clean for d in detect(touching))


def test_two_coloured_objects_are_not_clean():
    picture = scene(("square", "red", (32.0, 32.0), 14.0)).copy()
    blue = (picture[:, :32] < 200).any(-1)
    picture[:, :32][blue] = PALETTE["blue"]
    assert not any(d.clean for d in detect(picture))


def test_noise_neither_crashes_nor_passes():
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    assert not verify(noise, BOTH).correct

"""Captions, metadata and splits of the bundled world."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.world.grammar import (
    COLORS,
    KIND_WEIGHTS,
    KINDS,
    RELATIONS,
    SHAPES,
    draw_prompt,
    prompts,
    split_of,
    vocabulary,
)

SPLITS = ("train", "tune", "test")


@pytest.mark.parametrize("split", SPLITS)
def test_unshared_compositions_stay_in_their_split(split):
    rng = random.Random(split)
    records = [draw_prompt(split, rng) for _ in range(500)]
    assert all(record.shared or split_of(record.composition) == split for record in records)


def test_held_out_compositions_never_occur_in_training_captions():
    rng = random.Random(0)
    trained = {r.composition for r in (draw_prompt("train", rng) for _ in range(3000)) if not r.shared}
    for split in ("tune", "test"):
        assert not trained & {record.composition for record in prompts(split, 300, 0) if not record.shared}


def test_only_small_kinds_are_shared():
    rng = random.Random(1)
    shared = {record.kind for record in (draw_prompt("test", rng) for _ in range(500)) if record.shared}
    assert shared == {"single_object", "colors", "two_object", "counting"}


def test_test_split_gives_hundreds_of_distinct_captions_that_depend_on_the_seed():
    first, again, other = prompts("test", 500, 0), prompts("test", 500, 0), prompts("test", 500, 1)
    assert len({record.text for record in first}) == 500
    assert first == again
    assert {r.text for r in first} != {r.text for r in other}


def test_more_captions_than_exist_are_filled_with_repeats():
    records = prompts("tune", 1500, 0)
    assert len(records) == 1500
    assert len({record.text for record in records}) < 1500


def test_hard_kinds_dominate():
    assert sum(KIND_WEIGHTS.values()) == pytest.approx(1)
    assert KIND_WEIGHTS["position"] + KIND_WEIGHTS["color_attr"] + KIND_WEIGHTS["counting"] > 0.6


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(SPLITS))
def test_metadata_have_the_form_of_genevals_rows(seed, split):
    record = draw_prompt(split, random.Random(seed))
    metadata = record.metadata
    assert metadata["tag"] in KINDS
    assert metadata["prompt"] == record.text
    for index, row in enumerate(metadata["include"]):
        assert row["class"] in SHAPES
        assert 1 <= row["count"] <= 4
        assert row.get("color", COLORS[0]) in COLORS
        assert row["class"] in record.text
        if "position" in row:
            relation, target = row["position"]
            assert relation in RELATIONS
            assert relation in record.text
            assert target < index
    if metadata["tag"] == "counting":
        assert metadata["exclude"] == [{"class": row["class"], "count": row["count"] + 1}]
    assert set(record.text.split()) <= set(vocabulary())

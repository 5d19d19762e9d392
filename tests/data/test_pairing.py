"""Conversions between kinds, as pure functions of records."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.data.image_source import ImageSource
from diffalign.data.load import examples_from_records
from diffalign.data.pairing import PairingOptions, PairRule, pair_indices, utilities, votes
from diffalign.data.schema import KINDS, Record
from diffalign.errors import UserError

SCORES = [0.2, 0.9, 0.5, 0.9]


def images(count: int, prefix: str = "i") -> tuple[ImageSource, ...]:
    return tuple(ImageSource.from_bytes(b"x", f"{prefix}{index}") for index in range(count))


def record(count: int = 2, identity: str = "r", prompt: str = "a cat", prefix: str = "i", **known) -> Record:
    return Record(identity, prompt, images(count, prefix), **known)


def convert(records, kind, **options):
    records = records if isinstance(records, list) else [records]
    return examples_from_records(records, kind, PairingOptions(**options))


def names(example):
    return [image.name for image in example.images]


def test_all_ways_of_knowing_become_utilities():
    assert utilities(record(3, winner=1)) == [0, 1, 0]
    assert utilities(record(3, ranking=(2, 0, 1))) == [1, 0, 2]
    assert utilities(record(3, scores=(3.0, -1.0, 2.0))) == [3, -1, 2]
    assert utilities(record(2, tie=True)) == [0, 0]
    assert utilities(record(2)) is None


def test_votes_count_comparisons_won():
    # Two rewards, three images: (best, middle), (middle, tied last), (last, tied last).
    assert votes([(3, 5), (2, 1), (1, 1)]) == [1.0, 0.25, 0.0]
    assert utilities(record(3, scores=((3.0, 5.0), (2.0, 1.0), (1.0, 1.0)))) == [1.0, 0.25, 0.0]


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=5))
def test_votes_ignore_the_scale_of_each_reward(rows):
    rescaled = [(7 * a + 1, b * b * b) for a, b in rows]
    distinct = all(len({row[c] for row in table}) == len(rows) for table in (rows, rescaled) for c in (0, 1))
    if distinct:
        assert votes(rows) == votes(rescaled)
        assert sum(votes(rows)) == pytest.approx(len(rows) / 2)


@pytest.mark.parametrize(
    ("rule", "margin", "expected"),
    [
        ("best_worst", 0.0, [(1, 0)]),
        ("best_worst", 0.8, []),
        ("all", 0.0, [(1, 2), (1, 0), (3, 2), (3, 0), (2, 0)]),
        ("all", 0.4, [(1, 2), (1, 0), (3, 2), (3, 0)]),
        ("adjacent", 0.0, [(3, 2), (2, 0)]),
        ("tournament", 0.0, [(1, 0), (3, 2)]),
    ],
)
def test_pair_rules(rule, margin, expected):
    assert pair_indices(SCORES, rule, margin) == expected


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6), st.sampled_from(get_args(PairRule)))
def test_the_first_of_a_pair_is_better(values, rule):
    pairs = pair_indices(values, rule)
    assert all(values[better] > values[worse] for better, worse in pairs)
    assert bool(pairs) == (len(set(values)) > 1)


def test_a_tournament_has_its_final_first_and_a_match_for_every_image_but_the_winner():
    assert pair_indices([3, 1, 2, 5, 4], "tournament") == [(3, 4), (3, 0), (0, 1), (3, 2)]


def test_pairs_put_the_chosen_image_first_with_its_numbers():
    found = record(winner=1, scores=(0.25, 0.75), fields={"clip": (1.0, 2.0), "weight": 3.0})
    (example,), notes = convert(found, "pairs")
    assert names(example) == ["i1", "i0"]
    assert example.prompts == ("a cat", "a cat")
    assert example.fields == {"scores": (0.75, 0.25), "clip": (2.0, 1.0), "weight": 3.0}
    assert example.id == "r"
    assert notes == {}


def test_lists_become_pairs_with_ids_of_their_own():
    examples, _ = convert(record(4, scores=tuple(SCORES)), "pairs", rule="all")
    assert names(examples[0]) == ["i1", "i2"]
    assert len({e.id for e in examples}) == 5


def test_ties_are_counted():
    records = [record(identity="a", tie=True), record(identity="b", scores=(1.0, 1.0)), record(identity="c", winner=0)]
    examples, notes = convert(records, "pairs")
    assert [e.id for e in examples] == ["c"]
    assert notes == {"ties dropped": 2}
    _, notes = convert(record(scores=(1.0, 1.1)), "pairs", margin=0.5)
    assert notes == {"rows within the margin dropped": 1}


def test_the_margin_applies_to_scores_only():
    examples, _ = convert(record(winner=0), "pairs", margin=5.0)
    assert len(examples) == 1


def test_captions_follow_their_images():
    (example,), _ = convert(record(winner=1, captions=("of 0", "of 1")), "caption_pairs")
    assert names(example) == ["i1", "i0"]
    assert example.prompts == ("of 1", "of 0")
    _, notes = convert(record(winner=0, captions=("same", "same")), "caption_pairs")
    assert notes == {"pairs whose two captions are equal": 1}


def test_without_captions_the_rejected_image_gets_an_edited_one():
    records = [record(identity="a", prompt="a red cat", winner=0), record(identity="b", prompt="a blue cat", winner=0)]
    examples, _ = convert(records, "caption_pairs")
    assert [e.prompts[0] for e in examples] == ["a red cat", "a blue cat"]
    assert all(e.prompts[0] != e.prompts[1] for e in examples)


def test_ranked_lists_stand_best_first():
    (example,), _ = convert(record(4, scores=tuple(SCORES)), "ranked_lists")
    assert names(example) == ["i1", "i3", "i2", "i0"]
    assert example.fields["scores"] == (0.9, 0.9, 0.5, 0.2)
    (example,), _ = convert(record(3, ranking=(2, 0, 1)), "ranked_lists")
    assert names(example) == ["i2", "i0", "i1"]
    assert example.fields["scores"] == (2.0, 1.0, 0.0)
    (example,), _ = convert(record(2, scores=((1.0, 1.0), (2.0, 3.0))), "ranked_lists")
    assert example.fields["scores"] == ((2.0, 3.0), (1.0, 1.0))
    assert convert(record(2, tie=True), "ranked_lists") == ([], {"lists tied throughout dropped": 1})


def test_an_image_preferred_at_least_once_is_liked():
    shared = images(3)
    records = [
        Record("a", "x", (shared[0], shared[1]), winner=0),
        Record("b", "x", (shared[1], shared[2]), winner=0),
    ]
    examples, _ = convert(records, "unpaired")
    assert {names(e)[0]: e.fields["label"] for e in examples} == {"i0": 1.0, "i1": 1.0, "i2": 0.0}
    assert len({e.id for e in examples}) == 3


def test_labels_are_taken_as_they_are():
    records = [record(1, str(label), prefix=f"p{label}-", label=label) for label in (1.0, 0.0, 0.5)]
    examples, notes = convert(records, "unpaired")
    assert [e.fields["label"] for e in examples] == [1.0, 0.0]
    assert notes == {"ties dropped": 1}
    examples, notes = convert(records[:2], "winners")
    assert [e.id for e in examples] == ["1.0"]
    assert notes == {"disliked images left out": 1}


def test_winners_are_the_best_images_once_each():
    shared = images(3)
    records = [Record("a", "x", shared, scores=(1.0, 3.0, 2.0)), Record("b", "x", shared[1:], winner=0)]
    examples, _ = convert(records, "winners")
    assert [names(e) for e in examples] == [["i1"]]
    assert [names(e) for e in convert(record(1), "winners")[0]] == [["i0"]]


def test_mismatched_captions_carry_the_image_twice():
    (example,), _ = convert(record(winner=1, mismatched=("a dog",)), "mismatched_captions")
    assert names(example) == ["i1", "i1"]
    assert example.prompts == ("a cat", "a dog")


@pytest.mark.parametrize("kind", ["mismatched_captions", "caption_pairs"])
def test_every_mismatched_caption_has_its_turn(kind):
    examples, _ = convert(replace(record(2, winner=1), mismatched=("a dog", "a cow")), kind)
    turns = examples[-1]
    assert [turns.captions(draw)[-1] for draw in (0.0, 0.49, 0.5, 0.99)] == ["a dog", "a dog", "a cow", "a cow"]
    assert examples[0].captions(0.9)[0] == "a cat"


def test_an_image_that_wins_twice_gets_one_mismatched_caption():
    shared = images(3)
    records = [
        Record("a", "a red cat", shared[:2], winner=0),
        Record("b", "a red cat", (shared[0], shared[2]), winner=0),
        Record("c", "a blue dog", images(2, "other"), winner=0),
    ]
    examples, _ = convert(records, "mismatched_captions")
    assert len(examples) == 2


def test_captions_alone_are_unique():
    examples, _ = convert([record(identity="a"), record(identity="b"), record(identity="c", prompt="a dog")], "prompts")
    assert [e.prompts for e in examples] == [("a cat",), ("a dog",)]
    assert examples[0].images == ()


def test_liked_and_disliked_images_of_one_caption_make_pairs():
    records = [
        Record(f"{prompt}/{label}{i}", prompt, images(1, f"{prompt}{label}{i}"), label=label)
        for prompt, label, count in (("cat", 1.0, 3), ("cat", 0.0, 2), ("dog", 1.0, 1))
        for i in range(count)
    ]
    examples, notes = convert(records, "pairs")
    assert [names(e) for e in examples] == [["cat1.000", "cat0.000"], ["cat1.010", "cat0.010"]]
    assert notes == {"images without a counterpart of the same caption left out": 2}


def test_columns_with_gaps_are_kept_and_the_gaps_counted():
    records = [
        record(identity="a", winner=0, fields={"x": 1.0, "y": 1.0}),
        record(identity="b", winner=0, fields={"x": 2.0}),
        record(identity="c", winner=0, fields={"x": 3.0}),
    ]
    examples, notes = convert(records, "pairs")
    assert examples[0].fields == {"x": 1.0, "y": 1.0}
    assert examples[1].fields["x"] == 2.0
    assert math.isnan(examples[1].fields["y"])
    assert notes == {"examples without a number in column 'y' (NaN there)": 2}


@pytest.mark.parametrize("kind", ["pairs", "ranked_lists", "unpaired"])
def test_rows_that_say_nothing_of_preference_are_refused(kind):
    with pytest.raises(UserError, match="nothing says which image is preferred"):
        convert(record(2), kind)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_keeps_its_number_of_images_and_captions(kind):
    records = [
        record(4, str(i), f"a {c} cat", prefix=f"{i}-", scores=tuple(SCORES)) for i, c in enumerate(("red", "blue"))
    ]
    examples, _ = convert(records, kind)
    assert examples
    for example in examples:
        blocks = KINDS[kind].blocks
        assert len(example.images) == (4 if blocks < 0 else blocks)
        assert len(example.prompts) == max(1, len(example.images))
    assert len({example.id for example in examples}) == len(examples)


def test_notes_are_a_plain_mapping():
    assert not isinstance(convert(record(winner=0), "pairs")[1], Counter)

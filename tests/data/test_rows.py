"""Rows: the canonical columns and published layouts give the same records; every fault is named once."""

from __future__ import annotations

import pytest

from diffalign.data.layouts import from_hpd_choice, from_hpd_ranks, from_pickapic, recognise
from diffalign.data.rows import apply_column_map, record_from_row, require_columns
from diffalign.errors import UserError

IMAGES = ["a.png", "b.png"]


def record(**row):
    return record_from_row({"prompt": "a cat", "images": IMAGES, **row}, "row-0", "pairs.jsonl, row 0")


def test_the_three_ways_to_state_a_preference():
    assert record(winner=1).winner == 1
    assert record(ranking=[1, 0]).ranking == (1, 0)
    assert record(scores=[0.5, 2]).scores == (0.5, 2.0)
    assert record(scores=[[1, 2, 3], [4, 5, 6]]).scores == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    for tie in (None, "tie"):
        assert record(winner=tie).tie
    assert not record(winner=None, scores=[1, 2]).tie


def test_the_ways_to_give_images():
    names = [image.name for image in record(winner=0).images]
    assert names == IMAGES
    numbered = record_from_row({"prompt": "x", "image_0": "a.png", "image_1": "b.png", "winner": 0}, "r", "w")
    assert [image.name for image in numbered.images] == IMAGES
    chosen = record_from_row({"prompt": "x", "rejected": "b.png", "chosen": "a.png"}, "r", "w")
    assert [image.name for image in chosen.images] == IMAGES
    assert chosen.winner == 0
    assert len(record_from_row({"prompt": "x", "image": "a.png", "label": True}, "r", "w").images) == 1


def test_other_numbers_become_fields_and_other_columns_do_not():
    found = record(winner=0, margin=0.25, clip=[1, 2], annotator="me", votes=[1, 2, 3])
    assert found.fields == {"margin": 0.25, "clip": (1.0, 2.0)}


def test_metadata_and_mismatched_captions_are_read_in_each_form():
    assert record(winner=0, metadata='{"tag": "colors"}').metadata == {"tag": "colors"}
    assert record(winner=0, mismatched=[{"text": "a dog", "kind": "content"}]).mismatched == ("a dog",)
    assert record(winner=0, mismatched="a dog").mismatched == ("a dog",)
    assert record(winner=0, mismatched=["a dog", {"text": "a cow"}]).mismatched == ("a dog", "a cow")
    assert record(winner=0, captions=["x", "y"]).captions == ("x", "y")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ""}, r"prompt is empty \(''\)"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": None}, "prompt is missing; expected text"),
        ({"prompt": 7}, "prompt is a value of type int"),
        ({"winner": 2}, "winner is 2; expected the index of one of 2 images"),
        ({"winner": True}, "winner is True"),
        ({"winner": "a"}, "winner is 'a'"),
        ({"ranking": [0, 0]}, r"ranking is \[0, 0\]; expected the indices 0 to 1"),
        ({"scores": [1]}, r"scores is \[1\]; expected 2 finite numbers"),
        ({"scores": [1, float("nan")]}, "expected 2 finite numbers"),
        ({"scores": [[1, 2], [1]]}, "expected 2 finite numbers"),
        ({"label": "good"}, "label is 'good' of type str; expected 1 or true"),
        ({"label": 3}, "label is 3 of type int"),
        ({"captions": ["x"]}, "expected a list of 2 captions"),
        ({"captions": ["x", ""]}, r"captions\[1\] is empty"),
        ({"images": "a.png"}, "images is a value of type str; expected a list"),
        ({"images": ["a.png", None]}, r"images\[1\]: an image was expected .* but there is nothing"),
        ({"metadata": "{"}, "metadata is not valid JSON"),
    ],
)
def test_a_bad_cell_is_named_with_its_row(row, message):
    with pytest.raises(UserError, match=r"^pairs\.jsonl, row 0: .*" + message):
        record(**row)


def test_columns_are_renamed_and_common_names_found():
    row = {"caption": "x", "file": "a.png"}
    assert apply_column_map(row, {"image": "file"}) == {"prompt": "x", "image": "a.png"}
    assert apply_column_map({"caption": "x", "text": "y"}, {}) == {"caption": "x", "text": "y"}
    assert apply_column_map({"caption": "x", "text": "y"}, {"prompt": "text"})["prompt"] == "y"
    assert apply_column_map({"prompt": "x", "a": "y"}, {"prompt": "a"})["prompt"] == "y"


@pytest.mark.parametrize(
    ("columns", "column_map", "kind", "message"),
    [
        ({"description", "images", "winner"}, {}, "pairs", r"no column 'prompt'.*it has: description, images, winner.*"
         r"--column_map '\{\"prompt\": \"COLUMN\"\}'"),
        ({"prompt", "winner"}, {}, "pairs", "no column 'images'"),
        ({"prompt", "images"}, {}, "pairs", "no column 'winner'"),
        ({"prompt", "image"}, {}, "unpaired", "no column 'winner'"),
        ({"prompt", "images"}, {"prompt": "captoin"}, "pairs", "has no column 'captoin'"),
        ({"caption", "images", "winner"}, {"prompt": "captoin"}, "pairs", "did you mean 'caption'"),
        (set(), {}, "prompts", "it has: no columns at all"),
    ],
)  # fmt: skip
def test_a_missing_column_is_named_beside_those_that_exist(columns, column_map, kind, message):
    with pytest.raises(UserError, match=message):
        require_columns(columns, column_map, kind, "pairs.jsonl")


@pytest.mark.parametrize("kind", ["winners", "prompts", "mismatched_captions"])
def test_good_images_need_no_preference(kind):
    require_columns({"caption", "image"}, {}, kind, "data")


@pytest.mark.parametrize(("label", "winner"), [(1, 0), (1.0, 0), (0, 1), (0.5, None)])
def test_pickapic_labels(label, winner):
    row = {"jpg_0": b"0", "jpg_1": b"1", "caption": "x", "label_0": label, "label_1": 1 - label, "best_image_uid": "u"}
    assert from_pickapic(row) == {"prompt": "x", "images": [b"0", b"1"], "winner": winner}
    assert recognise(row).name == "Pick-a-Pic"


def test_pickapic_with_a_caption_for_each_image():
    row = {"jpg_0": b"0", "jpg_1": b"1", "caption": "x", "label_0": 0, "caption_0": "p", "caption_1": "q"}
    assert from_pickapic(row)["captions"] == ["p", "q"]


@pytest.mark.parametrize("label", ["1", 0.3, None, float("nan")])
def test_other_pickapic_labels_are_refused(label):
    with pytest.raises(UserError, match="expected 1"):
        from_pickapic({"jpg_0": b"", "jpg_1": b"", "caption": "x", "label_0": label})


def test_hpd_choices_and_ranks():
    choice = {"prompt": "x", "file_path": IMAGES, "human_preference": [0, 1], "user_hash": "h"}
    assert from_hpd_choice(choice) == {"prompt": "x", "images": IMAGES, "winner": 1}
    assert from_hpd_choice({**choice, "human_preference": [0, 0]})["winner"] is None
    assert recognise(choice).name == "HPDv2 train"
    ranks = {"prompt": "x", "image_path": ["a", "b", "c"], "rank": [2, 1, 3], "raw_annotations": []}
    assert from_hpd_ranks(ranks)["scores"] == [-2.0, -1.0, -3.0]
    assert recognise(ranks).name == "HPDv2 test"
    with pytest.raises(UserError, match="human_preference is"):
        from_hpd_choice({**choice, "human_preference": [1, 1]})
    with pytest.raises(UserError, match="rank is"):
        from_hpd_ranks({**ranks, "rank": "first"})


def test_canonical_columns_are_nobodys_layout():
    assert recognise({"prompt", "images", "winner", "jpg_0", "jpg_1", "label_0", "caption"}) is None

"""GenEval: captions, verdicts in limit cases, folders, the whole path on pictures whose truth is known."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffalign.errors import UserError
from diffalign.evaluation.geneval.evaluate import rules_name
from diffalign.evaluation.geneval.folder import read_folder
from diffalign.evaluation.geneval.prompts import OFFICIAL_PROMPTS_SHA256, as_prompts, generate_rows, official_rows
from diffalign.evaluation.geneval.verdict import Detection, Rules, judge, overlap, relations
from diffalign.evaluation.geneval.vocabulary import CLASSES, canonical
from diffalign.records import write_json
from diffalign.world.grammar import prompts
from tests.evaluation.conftest import write_geneval

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
side = st.floats(1, 60)
place = st.floats(0, 400)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[float, float, float, float]:
    left, top = draw(place), draw(place)
    return left, top, left + draw(side), top + draw(side)


def dogs(count: int, score: float = 0.95) -> list[Detection]:
    return [Detection("dog", (40.0 * i, 0.0, 40.0 * i + 30, 30.0), score) for i in range(count)]


def test_the_official_captions() -> None:
    import hashlib

    rows = official_rows()
    assert len(rows) == 553
    assert hashlib.sha256(as_prompts(rows).encode()).hexdigest() == OFFICIAL_PROMPTS_SHA256
    tags = [row["tag"] for row in rows]
    assert {tag: tags.count(tag) for tag in dict.fromkeys(tags)} == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100,
    }  # fmt: skip
    assert not any(clause["class"] == "person" for row in rows for clause in row["include"] if "color" in clause)


def test_new_captions_are_of_the_same_kind_and_others() -> None:
    rows, official = generate_rows(seed=1, count=20, max_count=6), generate_rows(count=20)
    assert [row["prompt"] for row in rows] != [row["prompt"] for row in official]
    assert {row["include"][0]["count"] for row in rows if row["tag"] == "counting"} <= set(range(2, 7))
    with pytest.raises(UserError, match="counts up to 11"):
        generate_rows(max_count=11)


@given(boxes(), boxes())
def test_swapping_two_boxes_turns_the_relation_round(first: tuple, second: tuple) -> None:
    there, back = relations(first, second), relations(second, first)
    assert sorted(OPPOSITE[name] for name in there) == sorted(back)
    assert len(there) <= 2


@given(boxes())
def test_a_box_has_no_relation_to_itself(box: tuple) -> None:
    assert relations(box, box) == []
    assert overlap(box, box) == pytest.approx(1)


def test_counts() -> None:
    row = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}
    assert [judge(dogs(n), row).correct for n in range(5)] == [False, False, True, False, False]
    others = [Detection(name, (300, 300, 310, 310), 0.99) for name in ("cat", "bench", "car")]
    assert judge([*dogs(2), *others], row).correct
    assert judge([*dogs(2), *dogs(3, score=0.9)], row).correct, "0.9 itself does not count"


def test_colours_are_those_of_the_best_objects() -> None:
    row = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    red, blue = (Detection("dog", (0, 0, 9, 9), score, color) for score, color in ((0.8, "red"), (0.7, "blue")))
    assert judge([blue, red], row).correct
    verdict = judge([blue], row)
    assert not verdict.correct
    assert verdict.reason == "expected red dog>=1, found 0 red; and 1 blue"


def test_labels_of_detectors_have_geneval_names() -> None:
    assert [canonical(label) for label in ("mouse", "Remote", "keyboard", "tvmonitor", "dog", "N/A")] == [
        "computer mouse", "tv remote", "computer keyboard", "tv", "dog", None,
    ]  # fmt: skip
    assert all(canonical(name) == name for name in CLASSES)


def test_the_name_of_the_rules_says_what_was_changed() -> None:
    assert rules_name(Rules()) == "geneval-v1"
    assert rules_name(Rules(threshold=0.5)) == "geneval-v1 (threshold=0.5)"


def test_true_pictures_are_correct_and_swapped_ones_are_not(script, true_pictures: Path) -> None:
    answer = script("geneval", "--images", true_pictures)
    assert answer.status == 0, answer.err
    assert "overall        1.00000" in answer.out
    output = true_pictures / "geneval"
    summary = json.loads((output / "summary.json").read_text())
    assert summary["images"] == summary["correct_images"] == 12
    assert summary["benchmark"] == "geneval-like (detector world)"
    row = json.loads((output / "results.jsonl").read_text().splitlines()[0])
    assert list(row) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert row["filename"] == "00000/samples/00000.png"
    assert json.loads(row["metadata"])["prompt"] == row["prompt"]

    first, last = (true_pictures / f"{index:05d}" / "metadata.jsonl" for index in (0, 11))
    one, other = first.read_text(), last.read_text()
    first.write_text(other)
    last.write_text(one)
    answer = script("geneval", "--images", true_pictures, "--output", true_pictures / "swapped")
    assert "10 of 12" in answer.out


def test_precomputed_boxes_give_the_verdicts_of_the_detector(script, true_pictures: Path, tmp_path: Path) -> None:
    assert script("geneval", "--images", true_pictures).status == 0
    rows = [json.loads(line) for line in (true_pictures / "geneval" / "results.jsonl").read_text().splitlines()]
    table = tmp_path / "boxes.jsonl"
    with table.open("w") as file:
        for row in rows:
            colors = {c["class"]: c.get("color") for c in json.loads(row["metadata"])["include"]}
            found = [
                {"class": name, "box": box[:4], "score": box[4], "color": colors.get(name)}
                for name, kept in json.loads(row["details"]).items()
                for box in kept
            ]
            file.write(json.dumps({"filename": row["filename"], "detections": found}) + "\n")
    answer = script("geneval", "--images", true_pictures, "--detector", f"boxes@{table}", "--output", tmp_path / "out")
    assert "overall        1.00000" in answer.out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["detector"]["name"] == "boxes@boxes.jsonl"
    assert len(manifest["detector"]["weights_hash"]) == 64


def test_mistakes_are_one_message(refused, true_pictures: Path, tmp_path: Path) -> None:
    assert "did you mean 'world'" in refused("geneval", "--images", true_pictures, "--detector", "wrld")
    assert "there is no folder" in refused("geneval", "--images", tmp_path / "nowhere")
    assert "not in GenEval's layout" in refused("geneval", "--images", tmp_path)
    message = refused("geneval", "--images", true_pictures, "--captions", "553")
    assert "pictures of 12 captions, expected 553" in message
    assert "no file of boxes" in refused("geneval", "--images", true_pictures, "--detector", "boxes@nothing.jsonl")
    table = tmp_path / "boxes.jsonl"
    table.write_text('{"filename": "00000/samples/00000.png", "detections": [{"class": "dog", "box": [1, 2]}]}\n')
    assert "boxes.jsonl, row 1" in refused("geneval", "--images", true_pictures, "--detector", f"boxes@{table}")
    table.write_text('{"filename": "x", "detections": []}\n')
    message = refused("geneval", "--images", true_pictures, "--detector", f"boxes@{table}")
    assert "has no row for 00000/samples/00000.png" in message
    picture = true_pictures / "00003" / "samples" / "00000.png"
    picture.write_bytes(picture.read_bytes()[:60])
    assert f"cannot read the image {picture}" in refused("geneval", "--images", true_pictures)
    picture.unlink()
    assert "1 of 12 captions" in refused("geneval", "--images", true_pictures)
    (true_pictures / "00005" / "metadata.jsonl").write_text("{}")
    assert "is no row of a caption" in refused("geneval", "--images", true_pictures)
    assert not (true_pictures / "geneval").exists()


def test_incomplete_folders_on_request_and_the_recorded_number(refused, script, true_pictures: Path) -> None:
    shutil.rmtree(true_pictures / "00011")
    write_json(true_pictures / "manifest.json", {"prompts": {"used": 12}})
    assert "pictures of 11 captions, expected 12" in refused("geneval", "--images", true_pictures)
    answer = script("geneval", "--images", true_pictures, "--allow_incomplete", "true")
    assert "11 of 11" in answer.out


def test_only_numbered_pictures_count(tmp_path: Path) -> None:
    folder = write_geneval(tmp_path / "x", [record.metadata for record in prompts("test", 2, seed=0)], pictures=2)
    Image.new("RGB", (8, 8)).save(folder / "00000" / "samples" / "grid.png")
    Image.new("RGB", (8, 8)).save(folder / "00000" / "grid.png")
    assert [sample.place for sample in read_folder(folder)] == [
        f"0000{index}/samples/0000{sample}.png" for index in range(2) for sample in range(2)
    ]


def test_captions_are_written_as_the_official_files(script, tmp_path: Path) -> None:
    assert script("geneval", "--write_prompts", tmp_path / "p.jsonl").status == 0
    assert (tmp_path / "p.jsonl").read_text() == "".join(json.dumps(row) + "\n" for row in official_rows())
    assert script("geneval", "--write_prompts", tmp_path / "p.txt", "--seed", "5", "--count", "3").status == 0
    assert len((tmp_path / "p.txt").read_text().splitlines()) == 95


def test_extra_objects_elsewhere_change_nothing() -> None:
    rng = random.Random(0)
    for _ in range(200):
        found = [
            Detection(rng.choice(CLASSES[:4]), (x := rng.random() * 300, y := rng.random() * 300, x + 50, y + 50), 0.95)
            for _ in range(4)
        ]
        row = {
            "tag": "position",
            "include": [
                {"class": CLASSES[0], "count": 1},
                {"class": CLASSES[1], "count": 1, "position": [rng.choice(list(OPPOSITE)), 0]},
            ],
        }
        extra = [Detection("zebra", (400, 400, 450, 450), 0.99)]
        assert judge(found, row).correct == judge([*found, *extra], row).correct

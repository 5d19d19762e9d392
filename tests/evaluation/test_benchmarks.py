"""The other benchmarks: limit cases of their arithmetic, their scripts on small files, what they refuse."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffalign.errors import UserError
from diffalign.evaluation import compbench, dpg, vbench
from diffalign.evaluation.prompt_sets import HPS_STYLES
from diffalign.records import read_json, write_jsonl
from diffalign.world.render import Placed, draw_scene
from tests.evaluation.test_comparison import write_set

CHAIN = {1: [], 2: [1], 3: [2], 4: []}


# --- DPG-Bench ------------------------------------------------------------------------------------------------------


def test_a_no_at_the_root_takes_its_descendants_along() -> None:
    yes = dict.fromkeys(CHAIN, "yes")
    assert dpg.image_score(CHAIN, yes) == 1
    assert dpg.counted(CHAIN, {**yes, 1: "no"}) == {1: 0, 2: 0, 3: 0, 4: 1}
    assert dpg.counted(CHAIN, {**yes, 2: "Yes."}) == {1: 1, 2: 0, 3: 0, 4: 1}, "only the word itself is a yes"
    with pytest.raises(UserError, match="no answer to question 4"):
        dpg.counted(CHAIN, {1: "yes", 2: "yes", 3: "yes"})


QUESTIONS = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
    "p1,a cat,,1,0,entity,whole,entity - whole (cat),Is there a cat?\n"
    'p1,a cat,,2,1,attribute,color,"attribute - color (cat, red)",Is the cat red?\n'
    "p2,a dog,,1,0,global,,global (photo),Is it a photo?\n"
)


def write_dpg(folder: Path) -> tuple[Path, Path]:
    (folder / "dpg_bench.csv").write_text(QUESTIONS)
    answers = [("p1", 0, 1, "yes"), ("p1", 0, 2, "no"), ("p1", 1, 1, "no"), ("p1", 1, 2, "yes"), ("p2", 0, 1, "yes")]
    keys = ("item_id", "tile", "proposition_id", "answer")
    write_jsonl(folder / "answers.jsonl", [dict(zip(keys, row, strict=True)) for row in answers])
    return folder / "dpg_bench.csv", folder / "answers.jsonl"


def test_dpg_of_answers(script, refused, tmp_path: Path) -> None:
    questions, answers = write_dpg(tmp_path)
    words = ("--questions", questions, "--answers", answers, "--judge", "toy", "--output", tmp_path / "dpg.json")
    answer = script("dpg", *words)
    assert answer.status == 0, answer.err
    assert "dpg-like (toy): 62.50 over 2 captions, 3 images" in answer.out  # p1: (1/2 + 0)/2, p2: 1
    record = read_json(tmp_path / "dpg.json")
    assert record["categories"] == {"entity": 50, "attribute": 50, "global": 100}
    official = script("dpg", *words, "--official", "true")
    assert "dpg-like (toy): 75.00" in official.out, "the official loader loses the first question"
    answers.write_text("\n".join(answers.read_text().splitlines()[:4]) + "\n")
    assert "1 of 2 captions have no answers, first p2" in refused("dpg", *words)
    assert "get dpg_bench/dpg_bench.csv of" in refused("dpg", *words, "--questions", tmp_path / "none.csv")


def test_dpg_reads_the_official_oddities(tmp_path: Path) -> None:
    questions, answers = write_dpg(tmp_path)
    assert [q.number for q in dpg.read_questions(questions, official=True)["p1"]] == [2]
    asked, given_ = dpg.read_questions(questions), dpg.read_answers(answers)
    assert asked["p1"][1] == dpg.Question(2, [1], "attribute - color", "Is the cat red?")
    assert dpg.summarise(asked, given_, official=True).broad == {"entity": 0, "attribute": 100, "global": 100}
    with answers.open("a") as file:
        file.write('{"item_id": "p2", "tile": 0, "proposition_id": 1, "answer": "no"}\n')
    with pytest.raises(UserError, match="answers question 1 of p2, image 0 twice"):
        dpg.read_answers(answers)


# --- T2I-CompBench --------------------------------------------------------------------------------------------------

corner = st.integers(0, 400).map(float)
extent = st.integers(1, 100).map(float)
MIRRORED = {"on the left of": "on the right of", "on the top of": "on the bottom of", "near": "near"}


@st.composite
def boxes(draw: st.DrawFn) -> compbench.Box:
    left, top = draw(corner), draw(corner)
    return left, top, left + draw(extent), top + draw(extent)


@given(boxes(), boxes(), st.sampled_from(sorted(MIRRORED)), st.floats(0, 1), st.floats(0, 1))
def test_the_spatial_score_is_symmetric_and_has_a_gap(
    first: compbench.Box, second: compbench.Box, phrase: str, one: float, other: float
) -> None:
    position = compbench.position_score(phrase, first, second)
    assert position == pytest.approx(compbench.position_score(MIRRORED[phrase], second, first))
    score = compbench.spatial_score((one, other), position)
    assert score == 0 or 0.5 <= score <= 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_a_product_is_no_larger_than_its_smallest_factor(probabilities: list[float]) -> None:
    assert compbench.attribute_score(probabilities) <= min(probabilities)


def test_captions_with_a_place_are_taken_apart() -> None:
    assert compbench.spatial_parts("a dog on the left of a potted plant.") == ("dog", "on the left of", "potted plant")
    assert compbench.spatial_parts("The woman is next to an oven") == ("person", "next to", "oven")
    with pytest.raises(UserError, match="no locality"):
        compbench.spatial_parts("a dog and a cat")
    assert compbench.SpatialRules().scaled(1024).distance_threshold == 300


def test_spatial_scores_of_pictures(script, refused, tmp_path: Path) -> None:
    scene = [Placed("star", "red", (16, 32), 9), Placed("circle", "blue", (48, 32), 9)]
    picture = Image.fromarray(draw_scene(scene, random.Random(0)))
    for name in ("a star on the left of a circle_000000", "a star on the right of a circle_000001", "grid"):
        picture.save(tmp_path / f"{name}.png")
    words = ("--category", "spatial", "--images", tmp_path, "--detector", "world", "--output", tmp_path / "out")
    answer = script("t2i_compbench", *words)
    assert answer.status == 0, answer.err
    assert "0.7500 over 2 rows" in answer.out
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == [1.0, 0.5]
    assert "needs --images and --detector" in refused("t2i_compbench", "--category", "spatial")
    assert "no pictures called" in refused("t2i_compbench", *words, "--images", tmp_path / "none")


def test_attribute_and_complex_scores_of_answers(script, refused, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"probabilities": [0.5, 0.5]}, {"probabilities": [1.0]}])
    answer = script("t2i_compbench", "--category", "attribute", "--answers", tmp_path / "a.jsonl")
    assert "0.6250 over 2 rows" in answer.out
    parts = {"attribute": 0.2, "spatial": 0.4, "action": 0.9}
    write_jsonl(tmp_path / "c.jsonl", [{"prompt": name, **parts} for name in ("s", "x", "both")])
    (tmp_path / "s.txt").write_text("s\n")
    (tmp_path / "x.txt").write_text("x\n")
    words = ("--category", "complex", "--answers", tmp_path / "c.jsonl")
    lists = ("--spatial_prompts", tmp_path / "s.txt", "--action_prompts", tmp_path / "x.txt")
    assert f"{(0.3 + 0.55 + 0.5) / 3:.4f} over 3 rows" in script("t2i_compbench", *words, *lists).out
    assert "needs --spatial_prompts" in refused("t2i_compbench", *words)
    (tmp_path / "c.jsonl").write_text("[1]\n")
    assert "c.jsonl, line 1" in refused("t2i_compbench", *words, *lists)


# --- HPSv2, PartiPrompts --------------------------------------------------------------------------------------------


def write_hps(folder: Path, count: int = 4) -> tuple[Path, Path]:
    images, prompts = folder / "images", folder / "prompts"
    prompts.mkdir()
    for number, style in enumerate(HPS_STYLES):
        (prompts / f"{style}.json").write_text(json.dumps([f"a {style} of {i}" for i in range(count)]))
        (images / style).mkdir(parents=True)
        for index in range(count):
            noise = torch.randn(24, 24, 3, generator=torch.Generator().manual_seed(index)) * 10 * (number + 1)
            Image.fromarray((128 + noise).clamp(0, 255).to(torch.uint8).numpy()).save(
                images / style / f"{index:05d}.jpg"
            )
    return images, prompts


def test_four_styles(script, refused, tmp_path: Path) -> None:
    images, prompts = write_hps(tmp_path)
    words = ("--images", images, "--prompts", prompts, "--reward", "incompressibility", "--chunk", "2")
    answer = script("hps_benchmark", *words, "--output", tmp_path / "hps.json")
    assert answer.status == 0, answer.err
    record = read_json(tmp_path / "hps.json")
    styles = record["results"]["incompressibility"]["styles"]
    assert list(styles) == list(HPS_STYLES)
    means = [styles[style]["mean"] for style in HPS_STYLES]
    assert means == sorted(means), "noisier styles take more kilobytes"
    assert record["results"]["incompressibility"]["average"] == pytest.approx(sum(means) / 4)
    (images / "photo" / "00003.jpg").unlink()
    assert "1 of 16 images are not in" in refused("hps_benchmark", *words)
    assert "15 images, 1 missing" in script("hps_benchmark", *words, "--allow_missing", "true").out
    (images / "photo" / "00002.jpg").write_bytes(b"no picture")
    assert "cannot read the image" in refused("hps_benchmark", *words, "--allow_missing", "true")
    (prompts / "photo.json").unlink()
    assert "lacks photo.json of HPSv2's four lists" in refused("hps_benchmark", *words)


def test_partiprompts_by_group(script, refused, tmp_path: Path) -> None:
    sets = [write_set(tmp_path / "a", [40, 40, 40, 0]), write_set(tmp_path / "b", [10, 10, 50, 10])]
    words = ("--images", sets[0], "--baseline", sets[1], "--rewards", "incompressibility")
    assert "has no 'category'" in refused("partiprompts", *words)
    for folder in sets:
        rows = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
        for row, category in zip(rows, ("Arts", "Arts", "Arts", "People"), strict=True):
            row["metadata"] = {"category": category, "challenge": "Basic"}
        write_jsonl(folder / "images.jsonl", rows)
    answer = script("partiprompts", *words, "--output", tmp_path / "parti.json")
    assert answer.status == 0, answer.err
    result = read_json(tmp_path / "parti.json")["results"]["incompressibility"]
    assert [(group["name"], group["images"]) for group in result["category"]] == [("Arts", 3), ("People", 1)]
    assert [round(group["win_rate"]["value"], 3) for group in result["category"]] == [0.667, 0.0]
    assert result["challenge"][0]["win_rate"]["value"] == 0.5


# --- UniGenBench, VBench --------------------------------------------------------------------------------------------


def test_unigenbench_of_judgements(script, refused, tmp_path: Path) -> None:
    table = tmp_path / "judged.csv"
    rows = [
        ("['Style', 'Attribute - Color']", "{'score': [1, 0]}"),
        ('["Style"]', '{"score": [2]}'),
        ("['Style']", "x"),
    ]
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("testpoint", "result_json"), *rows])
    words = ("--answers", table, "--judge", "toy", "--output", tmp_path / "u.json")
    answer = script("unigenbench", *words)
    assert answer.status == 0, answer.err
    assert "unigenbench-like (toy): 0.2500" in answer.out
    assert "1 rows without a readable judgement" in answer.out
    assert read_json(tmp_path / "u.json")["primary_dimensions"]["Style"] == {"correct": 1, "total": 2, "accuracy": 0.5}
    table.write_text("testpoint,result_json\nx,y\n")
    assert "none of 1 judgements can be read" in refused("unigenbench", *words)


def test_vbench_totals(script, refused, tmp_path: Path) -> None:
    best = {name: vbench.RANGES.get(name, (0, 1))[1] for name in (*vbench.QUALITY_WEIGHTS, *vbench.SEMANTIC)}
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps({name.replace(" ", "_"): value for name, value in best.items()}))
    assert script("vbench", "--raw", raw).out == "quality 1.0000, semantic 1.0000, total 1.0000\n"
    raw.write_text('{"scene": 0.5}')
    assert "counted as raw 0: subject consistency" in script("vbench", "--raw", raw).out
    raw.write_text('{"scenery": 0.5}')
    assert "did you mean 'scene'" in refused("vbench", "--raw", raw)
    raw.write_text("[")
    assert "not readable as JSON" in refused("vbench", "--raw", raw)


def test_a_still_video_does_not_move() -> None:
    flows = torch.zeros(7, 2, 16, 16)
    assert not vbench.dynamic_degree(flows, 8).dynamic
    flows[:2, 0] = 1.0
    moving = vbench.dynamic_degree(flows, 8)
    assert moving.count_needed == 2
    assert moving.dynamic

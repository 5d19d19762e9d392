"""DPG-Bench and UniGenBench asked of a server."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffalign.evaluation.asking import quarters, read_scores
from diffalign.records import read_json, write_jsonl
from tests.evaluation.test_benchmarks import write_dpg
from tests.rewards.judge_support import fake_server


@pytest.fixture(autouse=True)
def _transcripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFALIGN_TRANSCRIPTS", str(tmp_path / "transcripts"))


def picture_and_text(body: Mapping[str, Any]) -> tuple[Image.Image, str]:
    """Take a request apart."""
    parts = body["messages"][-1]["content"]
    text = next(part["text"] for part in parts if part["type"] == "text")
    uri = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"), text


def says_red(body: Mapping[str, Any]) -> tuple[int, str]:
    """Yes to every question on a red picture."""
    picture, _ = picture_and_text(body)
    return 200, "Yes, it is." if picture.getpixel((0, 0))[0] > 128 else "No."


def test_grids_are_cut_row_by_row() -> None:
    grid = Image.new("RGB", (4, 4))
    colors = [(10, 0, 0), (20, 0, 0), (30, 0, 0), (40, 0, 0)]
    for color, corner in zip(colors, [(0, 0), (2, 0), (0, 2), (2, 2)], strict=True):
        grid.paste(color, (*corner, corner[0] + 2, corner[1] + 2))
    assert [part.getpixel((1, 1)) for part in quarters(grid)] == colors


def test_dpg_of_a_server(script, refused, tmp_path: Path) -> None:
    questions, answers = write_dpg(tmp_path)
    answers.unlink()
    grids = tmp_path / "grids"
    grids.mkdir()
    half = Image.new("RGB", (32, 32), "blue")
    half.paste((255, 0, 0), (0, 0, 16, 32))
    half.save(grids / "p1.png")
    words = ("--questions", questions, "--images", grids, "--answers", answers, "--output", tmp_path / "out.json")
    with fake_server(says_red) as server:
        assert "1 of 2 captions have no images, first p2" in refused("dpg", *words, "--judge", server.address)
        Image.new("RGB", (32, 32), "red").save(grids / "p2.png")
        answer = script("dpg", *words, "--judge", server.address)
    assert answer.status == 0, answer.err
    assert ": 75.00 over 2 captions, 8 images" in answer.out  # half of p1's four images, all of p2's
    assert len(answers.read_text().splitlines()) == 12
    assert len(server.requests) == 5, "equal questions are asked once"
    record = read_json(tmp_path / "out.json")
    assert record["benchmark"].startswith("dpg-like (http://")
    assert record["categories"]["entity"] == 50


def test_unigenbench_of_a_server(script, refused, tmp_path: Path) -> None:
    images = tmp_path / "drawn"
    images.mkdir()
    rows = []
    for index, color in enumerate(("red", "blue", "green")):
        Image.new("RGB", (8, 8), color).save(images / f"{index}_0.png")
        points = {"Testpoints": ["Style", "Attribute - Color"], "Testpoint Description": ["a photo", "it is red"]}
        metadata = {"index": str(index), "sub_dims_en": points}
        rows.append(
            {"image": f"{index}_0.png", "prompt": "a red wall", "index": index, "sample": 0, "metadata": metadata}
        )
    write_jsonl(images / "images.jsonl", rows)

    def judge(body: Mapping[str, Any]) -> tuple[int, str]:
        picture, text = picture_and_text(body)
        assert "2. Attribute - Color: it is red" in text
        red, _, blue = picture.getpixel((0, 0))
        if max(red, blue) < 64:
            return 200, "<score>[1]</score>"
        return 200, f"<analysis>['x', 'y']</analysis><score>[1, {int(red > 128)}]</score>"

    words = ("--images", images, "--answers", tmp_path / "judged.jsonl")
    with fake_server(judge) as server:
        answer = script("unigenbench", *words, "--judge", server.address)
    assert answer.status == 0, answer.err
    assert "0.7500" in answer.out
    assert "1 rows without a readable judgement" in answer.out
    judged = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    assert [row["result_json"] for row in judged] == [{"score": [1, 1]}, {"score": [1, 0]}, None]
    write_jsonl(images / "images.jsonl", [{"image": "0_0.png", "prompt": "x"}])
    with fake_server(judge) as server:
        assert "has no 'Testpoints'" in refused("unigenbench", *words, "--judge", server.address)


@pytest.mark.parametrize(
    ("text", "scores"),
    [("<score>[1, 0]</score>", [1, 0]), ("<score>[1]</score>", None), ("<score>yes</score>", None), ("none", None)],
)
def test_scores_are_read(text: str, scores: list[int] | None) -> None:
    assert read_scores(text, 2) == scores

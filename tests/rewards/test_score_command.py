"""``diffalign score`` on files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from diffalign.cli.main import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, side in enumerate((48, 64)):
        Image.new("RGB", (side, 64), (255 * index, 0, 0)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("a photo of a red circle\n")
    return tmp_path


def test_scores_of_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "out" / "scores.jsonl"
    rewards = "tiny-pickscore,incompressibility"
    assert main(["score", str(folder), "--rewards", rewards, "--output", str(output), "--batch_size", "1"]) == 0
    assert "2 images scored" in capsys.readouterr().out
    alone = [json.loads(line) for line in output.read_text().splitlines()]
    assert main(["score", str(folder), "--rewards", rewards, "--output", str(output)]) == 0
    together = [json.loads(line) for line in output.read_text().splitlines()]
    for one, other in zip(alone, together, strict=True):
        assert one["tiny-pickscore"] == pytest.approx(other["tiny-pickscore"], abs=1e-4)
        assert one["incompressibility"] == other["incompressibility"]
    manifest = json.loads(output.with_suffix(".manifest.json").read_text())
    assert manifest["images"] == 2
    assert manifest["rewards"]["incompressibility"]["unit"].startswith("kilobytes")


def test_networks_run_in_half_precision_by_option(folder: Path) -> None:
    scores = {}
    for dtype in ("float32", "bfloat16"):
        output = folder / dtype / "scores.jsonl"
        words = ["score", str(folder), "--rewards", "tiny-pickscore", "--dtype", dtype, "--output", str(output)]
        assert main(words) == 0
        scores[dtype] = [json.loads(line)["tiny-pickscore"] for line in output.read_text().splitlines()]
    assert scores["bfloat16"] != scores["float32"]
    assert scores["bfloat16"] == pytest.approx(scores["float32"], abs=0.5)


def test_mistakes_are_one_message(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(*argv: str) -> str:
        assert main(["score", *argv]) == 2
        return capsys.readouterr().err

    source, rewards = str(folder), ("--rewards", "incompressibility")
    assert "did you mean 'incompressibility'" in message(source, "--rewards", "incompresibility")
    assert "no images at" in message(str(folder / "nowhere"), *rewards)
    assert "needs metadata" in message(source, "--rewards", "graded")
    (folder / "prompts").write_text("only one\n")
    assert "has 1 captions, but" in message(source, *rewards, "--prompts", str(folder / "prompts"))
    (folder / "table.jsonl").write_text('{"image": "0.png"}\n')
    assert "line 1: expected an object with 'image' and 'prompt'" in message(str(folder / "table.jsonl"), *rewards)
    (folder / "table.jsonl").write_text('{"image": "7.png", "prompt": "x"}\n')
    assert "1 of 1 images do not exist" in message(str(folder / "table.jsonl"), *rewards)
    (folder / "table.jsonl").write_bytes('{"image": "0.png", "prompt": "café"}\n'.encode("latin-1"))
    assert "table.jsonl, line 1: byte 34 of the line (0xe9) is not UTF-8" in message(
        str(folder / "table.jsonl"), *rewards
    )
    assert "batch size must be positive, not 0" in message(source, *rewards, "--batch_size", "0")
    (folder / "1.png").write_bytes(b"not a picture")
    assert "cannot read the image" in message(source, *rewards)
    (folder / "1.txt").unlink()
    assert "have no caption, first 1.png" in message(source, *rewards)

"""Scorers checked against fixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.records import write_jsonl


def fixture(**changes: Any) -> dict[str, Any]:
    row = {"image": "plain.png", "prompt": "grey", "reward": "compressibility", "score": -0.63, "tolerance": 0.4}
    return {**row, **changes}


def test_fixtures_are_checked(script, refused, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (128, 128, 128)).save(tmp_path / "plain.png")
    path = tmp_path / "known.jsonl"
    write_jsonl(path, [fixture(), fixture(reward="incompressibility", score=0.63)])
    answer = script("self_check", "--fixtures", path)
    assert answer.status == 0, answer.err
    assert answer.out.count("agrees") == 2
    write_jsonl(path, [fixture(), fixture(score=5.0)])
    assert "1 of 2 scores differ from what is known, first compressibility of" in refused(
        "self_check", "--fixtures", path
    )
    write_jsonl(path, [fixture(image="none.png")])
    assert "row 1: there is no picture" in refused("self_check", "--fixtures", path)
    write_jsonl(path, [fixture(score="high")])
    assert "score and tolerance must be numbers" in refused("self_check", "--fixtures", path)
    write_jsonl(path, [fixture(reward="compresibility")])
    assert "did you mean 'compressibility'" in refused("self_check", "--fixtures", path)

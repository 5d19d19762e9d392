"""Win rates of two folders: pairing, repeats, intervals, and what may not differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffalign.errors import UserError
from diffalign.evaluation.comparison import Comparison, pair, read_set
from diffalign.evaluation.winrate import clopper_pearson, exact_win_rate
from diffalign.records import read_json, write_json, write_jsonl

REWARD = ("--rewards", "incompressibility")


def write_set(folder: Path, greys: list[int], samples: int = 1, **sampling: object) -> Path:
    """Noisy pictures: more noise, more kilobytes; captions and seeds are those of their places."""
    rows = []
    for index, noise in enumerate(greys):
        place = f"images/{index:05d}_0.png"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(index)
        pixels = 128 + noise * torch.randn(32, 32, 3, generator=generator)
        Image.fromarray(pixels.clamp(0, 255).to(torch.uint8).numpy()).save(folder / place)
        caption, sample = divmod(index, samples)
        rows.append({"image": place, "prompt": f"a {caption}", "index": caption, "sample": sample, "seed": index})
    write_jsonl(folder / "images.jsonl", rows)
    write_json(folder / "manifest.json", {"sampling": {"steps": 15, **sampling}, "prompts": {"sha256": "x"}})
    return folder


def test_a_rate_with_its_records(script, tmp_path: Path) -> None:
    a, b = write_set(tmp_path / "a", [40, 40, 40, 0, 20]), write_set(tmp_path / "b", [10, 10, 10, 30, 20])
    output = tmp_path / "out"
    answer = script("winrate", "--a", a, "--b", b, *REWARD, "--output", output)
    assert answer.status == 0, answer.err
    assert "win rate 0.700" in answer.out
    assert "3 won, 1 tied, 1 lost" in answer.out
    record = read_json(output / "winrate.json")
    (summary,) = record["summaries"]
    assert summary["ci_low"] < summary["win_rate"] < summary["ci_high"]
    assert summary["n"] == summary["comparisons"] == 5
    assert record["generation"]["a"]["sampling"] == {"steps": 15}
    rows = [json.loads(line) for line in (output / "incompressibility.jsonl").read_text().splitlines()]
    assert [row["win"] for row in rows] == [1, 1, 1, 0, 0.5]
    assert rows[2] == {**rows[2], "prompt": "2: a 2", "seed": 2}

    swapped = script("winrate", "--a", b, "--b", a, *REWARD)
    assert "win rate 0.300" in swapped.out
    assert "win rate all 5 tied (0 won, 5 tied, 0 lost" in script("winrate", "--a", a, "--b", a, *REWARD).out


def test_repeated_rows_are_not_counted(script, tmp_path: Path) -> None:
    a, b = write_set(tmp_path / "a", [40, 0, 0]), write_set(tmp_path / "b", [10, 10, 10])
    table = a / "images.jsonl"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, lines[0], lines[0]]) + "\n")
    answer = script("winrate", "--a", a, "--b", b, *REWARD)
    assert "win rate 0.333" in answer.out
    assert "3 pairs of images of 3 captions; 2 repeats not counted" in answer.out


def test_what_was_drawn_otherwise_is_not_compared(refused, script, tmp_path: Path) -> None:
    a, b = write_set(tmp_path / "a", [1, 2, 3]), write_set(tmp_path / "b", [1, 2])
    assert "the candidate has 1 images that the baseline lacks" in refused("winrate", "--a", a, "--b", b, *REWARD)
    b = write_set(tmp_path / "b", [1, 2, 3], guidance=3)
    message = refused("winrate", "--a", a, "--b", b, *REWARD)
    assert "not drawn alike (sampling.guidance: None, not 3)" in message
    output = tmp_path / "out"
    allowed = ("--allow_differences", "true", "--output", output)
    assert script("winrate", "--a", a, "--b", b, *REWARD, *allowed).status == 0
    assert read_json(output / "winrate.json")["differences"] == ["sampling.guidance: None, not 3"]
    (a / "images" / "00001_0.png").unlink()
    assert "1 of 3 images do not exist" in refused("winrate", "--a", a, "--b", b, *REWARD)


def test_other_seeds_are_not_compared(tmp_path: Path) -> None:
    a, b = write_set(tmp_path / "a", [1, 2]), write_set(tmp_path / "b", [1, 2])
    table = b / "images.jsonl"
    table.write_text(table.read_text().replace('"seed": 1', '"seed": 9'))
    with pytest.raises(UserError, match="1 seeds"):
        pair(read_set(a), read_set(b))


def test_plain_folders_pair_by_caption(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{name}{index}.png")
    (tmp_path / "captions").write_text("x\nx\ny\n")
    sets = [read_set(tmp_path / name, tmp_path / "captions") for name in ("a", "b")]
    keys, changes = pair(*sets)
    assert keys == [("x", 0), ("x", 1), ("y", 0)]
    assert not changes


def test_captions_with_several_images_have_equal_weight() -> None:
    keys = [("x", 0), ("x", 1), ("x", 2), ("y", 0)]
    comparison = Comparison(keys, torch.tensor([1.0, 1, 1, 0]), torch.tensor([0.0, 0, 0, 1]))
    assert comparison.rate().value == 0.5
    assert comparison.summary("any", "auto")["interval"] == "bootstrap"
    with pytest.raises(UserError, match="needs one image a caption"):
        comparison.rate("exact")


def test_a_few_wins_among_ties_prove_nothing() -> None:
    """Four wins and 396 ties: resampling never meets a loss, which the next captions may well bring."""
    a, b = torch.zeros(400), torch.zeros(400)
    a[:4] = 1.0
    comparison = Comparison([(str(i), 0) for i in range(400)], a, b)
    assert comparison.rate("bootstrap").low > 0.5
    assert comparison.rate().low < 0.5
    assert comparison.rate() == comparison.rate("exact")
    summary = comparison.summary("any")
    assert (summary["interval"], summary["ties"]) == ("exact", 396)


def test_intervals_shrink_and_a_shift_of_all_scores_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(400, generator=generator, dtype=torch.float64), torch.zeros(400, dtype=torch.float64)

    def width(n: int, interval: str) -> float:
        keys = [(str(i), 0) for i in range(n)]
        estimate = Comparison(keys, a[:n], b[:n]).rate(interval)
        assert estimate == Comparison(keys, a[:n] + 2, b[:n] + 2).rate(interval)
        assert estimate.low <= estimate.value <= estimate.high
        return estimate.high - estimate.low

    for interval in ("bootstrap", "wilson", "exact"):
        assert width(100, interval) / width(400, interval) == pytest.approx(2, rel=0.2)


def test_the_exact_interval_has_its_published_values() -> None:
    # Clopper and Pearson's for 8 of 10 at 95 %: [0.4439, 0.9748]; none of 10: upper end 1 - 0.025 ** 0.1
    assert clopper_pearson(8, 10) == pytest.approx((0.4439, 0.9748), abs=1e-4)
    assert clopper_pearson(0, 10) == pytest.approx((0.0, 1 - 0.025**0.1))
    assert clopper_pearson(10, 10) == pytest.approx((0.025**0.1, 1.0))
    tied = exact_win_rate(torch.tensor([1.0] * 8 + [0.0] * 2 + [0.5] * 10))
    assert tied.value == 0.65
    assert tied.low == pytest.approx((0.4439 * 10 + 5) / 20, abs=1e-4)
    assert exact_win_rate(torch.full((4,), 0.5)).low == 0.5

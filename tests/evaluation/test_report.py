"""Comparison of models: what is paired with what, the figures, and the page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from diffalign.errors import UserError
from diffalign.evaluation.report.entries import read_entries
from diffalign.evaluation.report.side_by_side import put_side_by_side
from diffalign.evaluation.report.write import PAGE, TABLES, ReportOptions, inline_image, write_report
from diffalign.evaluation.winrate import win_rate
from tests.data.support import picture, write_jsonl

TAGS = ("colors", "counting")


def write_model(
    folder: Path, scores: Sequence[float], seed: int | None = 7, size: int = 12, prompts: str = "caption {}"
) -> Path:
    """A folder of images as eval/generate.py leaves it, with scores and GenEval's verdicts."""
    rows: list[dict[str, Any]] = []
    for index in range(len(scores)):
        path = folder / "images" / f"{index:05}_0.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(index, size, size).save(path)
        row = {"image": f"images/{path.name}", "prompt": prompts.format(index), "index": index, "sample": 0}
        rows.append(row | {"metadata": {"tag": TAGS[index % 2]}} | ({} if seed is None else {"seed": seed + index}))
    write_jsonl(folder / "images.jsonl", rows)
    # As scored from another folder: only the end of the path is the same.
    scored = [
        {"image": f"elsewhere/{folder.name}/{row['image']}", "prompt": row["prompt"], "proxy": score}
        for row, score in zip(rows, scores, strict=True)
    ]
    write_jsonl(folder / "scores.jsonl", scored)
    (folder / "scores.manifest.json").write_text(json.dumps({"rewards": {"proxy": {"unit": "logit"}}}))
    (folder / "geneval").mkdir(exist_ok=True)
    verdicts = [
        {"filename": row["image"], "tag": row["metadata"]["tag"], "prompt": row["prompt"], "correct": score > 0.5}
        for row, score in zip(rows, scores, strict=True)
    ]
    write_jsonl(folder / "geneval" / "results.jsonl", verdicts)
    manifest = {"preset": "tiny-sd-v1", "sampling": {"steps": 15, "guidance": 5.0}, "prompts": {"name": "world"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"method": "sft", "max_train_steps": 3, "seed": 1}))
    write_jsonl(
        folder / "metrics.jsonl", [{"step": step, "loss": 1 / step, "learning_rate": 1e-4} for step in (1, 2, 3)]
    )
    return folder


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    base = write_model(tmp_path / "base", [0.1, 0.2, 0.3, 0.9])
    tuned = write_model(tmp_path / "tuned", [0.2, 0.8, 0.3, 0.7])
    return [f"base={base}", f"tuned={tuned}", f"tuned={write_run(tmp_path / 'run')}"]


def test_figures_are_those_of_the_paired_images(sources: list[str]) -> None:
    entries = read_entries(sources)
    found = put_side_by_side(entries)
    assert found is not None
    assert found.rewards == ("geneval", "proxy")
    base, tuned = found.entries
    assert found.mean(tuned, "proxy").value == pytest.approx(0.5)
    rate = found.win_rate(tuned, base, "proxy")
    assert rate.value == pytest.approx(win_rate(found.scores(tuned, "proxy"), found.scores(base, "proxy")).value)
    assert rate.value == pytest.approx(2.5 / 4)
    assert found.win_rate(base, tuned, "proxy").value == pytest.approx(1 - rate.value)
    assert found.win_rate(tuned, base, "proxy", tie_margin=10).value == 0.5
    assert found.by_category(tuned, "geneval") == {"colors": 0.0, "counting": 1.0}
    assert found.seeded
    assert [key[0] for key in found.sample(2)] == ["0: caption 0", "2: caption 2"]
    assert entries[1].config["method"] == "sft"
    assert [row["step"] for row in entries[1].curve] == [1, 2, 3]


def test_rows_in_another_order(sources: list[str], tmp_path: Path) -> None:
    for name in ("images.jsonl", "scores.jsonl", "geneval/results.jsonl"):
        table = tmp_path / "tuned" / name
        table.write_text("\n".join(reversed(table.read_text().splitlines())) + "\n")
    found = put_side_by_side(read_entries(sources))
    assert found is not None
    assert found.scores(found.entries[1], "proxy").tolist() == [0.2, 0.8, 0.3, 0.7]


def test_differences_are_told_where_they_are_allowed(tmp_path: Path) -> None:
    models = [f"{name}={write_model(tmp_path / name, [0.1, 0.2], seed=seed)}" for name, seed in (("a", 1), ("b", 2))]
    page = write_report(read_entries(models), tmp_path / "out", ReportOptions(allow_differences=True))
    assert "Not drawn alike: b: 2 seeds" in page.read_text()


def test_the_page_needs_no_other_file(sources: list[str], tmp_path: Path) -> None:
    page = write_report(read_entries(sources), tmp_path / "out", ReportOptions(title="A < B", captions=3))
    assert page == tmp_path / "out" / PAGE
    text = page.read_text()
    assert "A &lt; B" in text
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text)
    assert "<script" not in text
    assert text.count('alt="caption ') == 2 * 3
    assert "0.625" in text
    files = {path.name for path in page.parent.iterdir()}
    assert files == {PAGE, TABLES, "distributions.png", "categories.png", "training.png"}
    for name in ("distributions", "categories", "training"):
        with Image.open(page.parent / f"{name}.png") as plot:
            assert plot.format == "PNG"
    tables = (page.parent / TABLES).read_text()
    assert "## Win rates by proxy" in tables
    assert "| tuned | 0.625 [" in tables
    assert "| sampling preset | tiny-sd-v1 | tiny-sd-v1 |" in tables


def test_runs_alone_and_images_alone(sources: list[str], tmp_path: Path) -> None:
    page = write_report(read_entries(sources[2:]), tmp_path / "runs-only")
    assert {path.suffix for path in page.parent.iterdir()} == {".html", ".md", ".png"}
    folder = tmp_path / "plain"
    folder.mkdir()
    picture(0).save(folder / "a.png")
    (folder / "a.txt").write_text("a caption")
    text = write_report(read_entries([f"plain={folder}"]), tmp_path / "plain-only").read_text()
    assert "Seeds were not recorded" in text


def test_large_images_are_made_smaller(tmp_path: Path) -> None:
    entries = read_entries([f"big={write_model(tmp_path / 'big', [0.5], size=500)}"])
    assert entries[0].images is not None
    (item,) = entries[0].images.entries.values()
    assert inline_image(item.image, 600).startswith("data:image/jpeg")  # many bytes
    assert len(inline_image(item.image, 64)) < 8000


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", [0.1, 0.2])

    def message(*more: str) -> str:
        with pytest.raises(UserError) as error:
            put_side_by_side(read_entries([f"base={base}", *more]))
        return str(error.value)

    assert "2 seeds" in message(f"other={write_model(tmp_path / 'seeds', [0.1, 0.2], seed=8)}")
    assert "that the baseline lacks" in message(f"other={write_model(tmp_path / 'words', [0.1], prompts='else {}')}")
    assert "expected NAME=PATH" in message(str(base))
    assert "there is nothing at" in message(f"other={tmp_path / 'nowhere'}")
    assert "two folders of images" in message(f"base={base}")
    strange = write_jsonl(tmp_path / "strange.jsonl", [{"image": "x.png", "proxy": 1.0}])
    assert "none of the images compared" in message(f"base={strange}")
    assert "of which no folder is given" in message(f"other={strange}")
    (tmp_path / "bad.jsonl").write_text("no json\n")
    assert "bad.jsonl, line 1" in message(f"base={tmp_path / 'bad.jsonl'}")
    with pytest.raises(UserError, match="nothing to report"):
        write_report([], tmp_path / "out")
    (base / "images" / "00000_0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot read the image"):
        write_report(read_entries([f"base={base}"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_script(script: Any, refused: Any, sources: list[str], tmp_path: Path) -> None:
    answer = script("report", *sources, "--output", tmp_path / "out", "--captions", 1)
    assert answer.status == 0
    assert str(tmp_path / "out" / PAGE) in answer.out
    assert "there is nothing at" in refused("report", f"base={tmp_path / 'nowhere'}")

"""Real weights on real photographs; the numbers are those of the official code, or were measured with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from diffalign.cli.main import main
from diffalign.rewards.brisque import Brisque
from diffalign.rewards.loading import load_reward
from diffalign.rewards.lpips import Lpips, Net
from diffalign.rewards.nsfw import Safety
from diffalign.rewards.preprocess import to_tensor
from diffalign.rewards.sentences import SentenceEmbedder
from tests.rewards.photographs import photograph

pytestmark = pytest.mark.weights


@pytest.mark.parametrize(("net", "wanted"), [("alex", (0.083, 0.542, 0.594)), ("vgg", (0.083, 0.447, 0.701))])
def test_lpips_of_a_cat_blurred_and_replaced(net: Net, wanted: tuple[float, ...]) -> None:
    metric, cat = Lpips.load(net), photograph("chelsea")
    others = [cat.filter(ImageFilter.GaussianBlur(2)), cat.filter(ImageFilter.GaussianBlur(8)), photograph("coffee")]
    small = [to_tensor(picture.resize((128, 128)))[None] for picture in (cat, *others)]
    assert metric(small[0], small[0]).item() == 0.0
    distances = metric(small[0].expand(3, -1, -1, -1), torch.cat(small[1:]))
    assert distances.tolist() == pytest.approx(wanted, abs=6e-4)


@pytest.mark.parametrize(
    ("name", "sharp", "blurred", "corner"),
    [
        ("chelsea", 2.870766629, 67.785034276, 13.778258198),
        ("coffee", 3.047926428, 72.027418726, 29.818015632),
        ("astronaut", 10.794862939, 65.255662013, 25.097712086),
    ],
)
def test_brisque_gives_the_packages_own_scores(name: str, sharp: float, blurred: float, corner: float) -> None:
    reward, picture = Brisque.load(), photograph(name)
    versions = (picture, picture.filter(ImageFilter.GaussianBlur(2)), picture.crop((0, 0, 201, 151)))
    scores = [-reward.score(to_tensor(version)[None], [""]).item() for version in versions]
    assert scores == pytest.approx([sharp, blurred, corner], abs=5e-3)


@pytest.mark.parametrize(
    ("name", "official", "plain"),
    [("chelsea", 0.0001, 0.0001), ("astronaut", 0.0318, 0.0167), ("coffee", 0.0130, 0.0163)],
)
def test_photographs_are_safe(name: str, official: float, plain: float) -> None:
    reward, picture = load_reward("nsfw"), photograph(name)
    assert isinstance(reward, Safety)
    score = reward.score(to_tensor(picture)[None], [""])
    assert 1 - score.item() == pytest.approx(official, abs=2e-4)
    # What the reference's bilinear resize and passage through JPEG change can be seen.
    cropped = np.asarray(picture.resize((256, 256)).crop((16, 16, 240, 240)), dtype=np.float32)
    batch = (cropped[None, :, :, ::-1] - np.array([104, 117, 123], dtype=np.float32)).copy()
    assert reward.classify(batch)[0, 1] == pytest.approx(plain, abs=2e-4)


def test_drawn_text_is_read_and_other_text_is_not() -> None:
    pytest.importorskip("rapidocr")
    picture = Image.new("RGB", (640, 160), "white")
    ImageDraw.Draw(picture).text((30, 40), "HELLO WORLD 2026", fill="black", font=ImageFont.load_default(64))
    reward, image = load_reward("ocr"), to_tensor(picture)[None]
    assert reward.score(image, ['a sign that says "Hello World 2026"']).item() == 1.0
    assert reward.score(image, ['a sign that says "Goodbye"']).item() < 0.5


def test_one_command_scores_photographs_of_different_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("chelsea", "coffee", "astronaut"):
        photograph(name).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a photo of {name}")
    output = tmp_path / "out" / "scores.jsonl"
    rewards = f"nsfw,lpips,brisque,incompressibility,lpips@{tmp_path / 'coffee.png'}"
    assert main(["score", str(tmp_path), "--rewards", rewards, "--output", str(output)]) == 0
    assert "3 images scored" in capsys.readouterr().out
    rows = {Path(row["image"]).stem: row for row in map(json.loads, output.read_text().splitlines())}
    assert rows["chelsea"]["brisque"] == pytest.approx(-2.8708, abs=5e-3)
    assert all(0.5 < row["lpips"] < 0.9 and row["nsfw"] > 0.9 for row in rows.values())
    to_coffee = {name: row[f"lpips@{tmp_path / 'coffee.png'}"] for name, row in rows.items()}
    assert to_coffee["coffee"] == pytest.approx(0.0, abs=1e-6)
    assert to_coffee["chelsea"] < -0.5
    manifest = json.loads(output.with_suffix(".manifest.json").read_text())
    assert all(manifest["rewards"][name]["weights_hash"] for name in ("nsfw", "lpips", "brisque"))


def test_sentences_of_one_meaning_are_near() -> None:
    embedder = SentenceEmbedder.load()
    one = ["a red apple on a table"] * 2
    others = ["a crimson fruit lying on a desk", "stock markets fell sharply"]
    similarity = embedder.similarity(one, others)
    assert similarity.tolist() == pytest.approx([0.577, 0.082], abs=2e-3)
    # Padding to the longest text of a batch changes nothing.
    alone = torch.cat([embedder.similarity(one[:1], [other]) for other in others])
    torch.testing.assert_close(alone, similarity, atol=1e-5, rtol=0)

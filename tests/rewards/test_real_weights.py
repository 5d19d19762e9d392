"""Real weights on real photographs; the numbers are those of the official code, or were measured with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import ImageFilter

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


def test_sentences_of_one_meaning_are_near() -> None:
    embedder = SentenceEmbedder.load()
    one = ["a red apple on a table"] * 2
    others = ["a crimson fruit lying on a desk", "stock markets fell sharply"]
    similarity = embedder.similarity(one, others)
    assert similarity.tolist() == pytest.approx([0.577, 0.082], abs=2e-3)
    # Padding to the longest text of a batch changes nothing.
    alone = torch.cat([embedder.similarity(one[:1], [other]) for other in others])
    torch.testing.assert_close(alone, similarity, atol=1e-5, rtol=0)

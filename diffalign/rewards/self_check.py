"""Known pictures with known scores: does an installation score them as their authors did?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffalign.errors import UserError
from diffalign.records import read_jsonl
from diffalign.rewards.loading import load_reward
from diffalign.rewards.scoring import Item, score_items

_KEYS = ("image", "prompt", "reward", "score", "tolerance")


@dataclass(frozen=True)
class Fixture:
    """A score that somebody vouches for.

    Args:
        item: picture and caption.
        reward: the scorer, "NAME" or "NAME@SOURCE", with its version where versions differ.
        score: what it must give.
        tolerance: largest absolute difference.
    """

    item: Item
    reward: str
    score: float
    tolerance: float


@dataclass(frozen=True)
class Checked:
    """A fixture and the score it got here."""

    fixture: Fixture
    got: float

    @property
    def agrees(self) -> bool:
        """The score is within the tolerance."""
        return abs(self.got - self.fixture.score) <= self.fixture.tolerance

    def __str__(self) -> str:
        known = self.fixture
        verdict = "agrees" if self.agrees else "DIFFERS"
        return f"{known.reward} of {known.item.image.name}: {self.got:.5f}, expected {known.score:.5f}: {verdict}"


def read_fixtures(path: Path) -> list[Fixture]:
    """Read fixtures: JSONL rows of image (relative to the file), prompt, reward, score, tolerance.

    Raises:
        UserError: if the file or a picture is absent, or a row has another form.
    """
    fixtures = []
    for number, row in enumerate(read_jsonl(path, _KEYS), 1):
        try:
            item = Item(path.parent / row["image"], str(row["prompt"]), row.get("metadata"))
            fixtures.append(Fixture(item, str(row["reward"]), float(row["score"]), float(row["tolerance"])))
        except (TypeError, ValueError) as problem:
            raise UserError(f"{path}, row {number}: score and tolerance must be numbers ({problem})") from problem
        if not item.image.is_file():
            raise UserError(f"{path}, row {number}: there is no picture {item.image}")
    return fixtures


def check(fixtures: Sequence[Fixture], device: str | torch.device = "cpu") -> list[Checked]:
    """Score fixtures, each reward loaded once; returned in their order."""
    got: dict[int, float] = {}
    for name in dict.fromkeys(fixture.reward for fixture in fixtures):
        places = [index for index, fixture in enumerate(fixtures) if fixture.reward == name]
        scores = score_items([fixtures[index].item for index in places], {name: load_reward(name, device)})[name]
        got |= dict(zip(places, scores.tolist(), strict=True))
    return [Checked(fixture, got[index]) for index, fixture in enumerate(fixtures)]

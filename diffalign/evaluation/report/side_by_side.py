"""Models side by side: the images that all of them drew of the same captions from the same noise; figures alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.evaluation.comparison import Comparison, ImageSet, Key, pair
from diffalign.evaluation.report.entries import Entry
from diffalign.evaluation.winrate import Estimate, bootstrap_mean


@dataclass(frozen=True)
class SideBySide:
    """Figures of models that drew the same captions.

    Args:
        entries: the models that have images, in the order given.
        keys: caption and number of each image.
        rewards: what all images of all models were scored by.
        changes: what differs in how images were drawn, where that was allowed.
    """

    entries: Sequence[Entry]
    keys: Sequence[Key]
    rewards: tuple[str, ...]
    changes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The models."""
        return [entry.name for entry in self.entries]

    @property
    def seeded(self) -> bool:
        """Whether the seed of every image is recorded."""
        return all(key in images_of(entry).seeds for entry in self.entries for key in self.keys)

    def scores(self, entry: Entry, reward: str) -> Tensor:
        """Scores of a model's images, (n,) float64."""
        return torch.tensor([entry.scores[key][reward] for key in self.keys], dtype=torch.float64)

    def mean(self, entry: Entry, reward: str) -> Estimate:
        """Mean score, every caption of equal weight, with its 95 % bootstrap interval over captions."""
        rows: dict[str, list[int]] = {}
        for index, (caption, _) in enumerate(self.keys):
            rows.setdefault(caption, []).append(index)
        scores = self.scores(entry, reward)
        return bootstrap_mean(torch.stack([scores[index].mean() for index in rows.values()])[None])

    def win_rate(self, entry: Entry, rival: Entry, reward: str, tie_margin: float = 0.0) -> Estimate:
        """Share of images that a reward prefers to the rival's, with its interval; see ``Comparison.rate``."""
        return Comparison(self.keys, self.scores(entry, reward), self.scores(rival, reward), tie_margin).rate()

    @property
    def categories(self) -> dict[str, list[int]]:
        """Category -> places of its images; empty unless every image has one."""
        known = self.entries[0].categories
        found: dict[str, list[int]] = {}
        for index, key in enumerate(self.keys):
            found.setdefault(known.get(key, ""), []).append(index)
        return {} if "" in found else dict(sorted(found.items()))

    def by_category(self, entry: Entry, reward: str) -> dict[str, float]:
        """Mean score in each category."""
        scores = self.scores(entry, reward)
        return {category: scores[places].mean().item() for category, places in self.categories.items()}

    def sample(self, count: int) -> list[Key]:
        """So many images, at equal distances: not chosen by what they look like."""
        count = min(count, len(self.keys))
        return [self.keys[index * len(self.keys) // count] for index in range(count)]


def images_of(entry: Entry) -> ImageSet:
    """Return the images of a model that has some."""
    assert entry.images is not None
    return entry.images


def put_side_by_side(entries: Sequence[Entry], allow_differences: bool = False) -> SideBySide | None:
    """Pair the images of all models that have any.

    Args:
        entries: the models.
        allow_differences: compare although seeds or sampling settings differ; the page says so.

    Returns:
        the comparison; None if no model has images.

    Raises:
        UserError: if captions are not the same, or seeds or settings differ.
    """
    drawn = [entry for entry in entries if entry.images is not None]
    if not drawn:
        return None
    changes: list[str] = []
    for entry in drawn[1:]:
        _, differing = pair(images_of(entry), images_of(drawn[0]), allow_differences)
        changes += [f"{entry.name}: {change}" for change in differing]
    keys = list(images_of(drawn[0]).entries)
    everything = [entry.scores.get(key, {}) for entry in drawn for key in keys]
    rewards = tuple(reward for reward in everything[0] if all(reward in scores for scores in everything))
    return SideBySide(drawn, keys, rewards, tuple(changes))

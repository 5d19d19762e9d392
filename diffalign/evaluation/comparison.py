"""Two models on the same captions from the same noise: pairing their images, win rates by any reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.evaluation.generation import TABLE
from diffalign.evaluation.manifest import differences, generation_of
from diffalign.evaluation.winrate import Estimate, bootstrap_mean, exact_win_rate, win_rate, wins
from diffalign.records import read_jsonl
from diffalign.rewards.scoring import Item, read_items

Interval = Literal["auto", "bootstrap", "wilson", "exact"]
"""How the interval of a win rate is found. "auto" is "exact" with one image a caption, else "bootstrap", which is too
narrow where nearly all captions tie: the few decided ones are resampled, and a side without a win never gets one."""
COMPARABLE = ("sampling", "prompts")
"""Parts of two manifests that must agree; the models may differ, nothing else."""
PREFERENCE_SCALE = {"pickscore": 1.0, "tiny-pickscore": 1.0, "image_reward": 1.0, "hpsv2": 100.0, "hpsv2.1": 100.0}
"""Factor that makes a difference of scores the logit of a preference (Bradley-Terry)."""

Key = tuple[str, int]


@dataclass(frozen=True)
class ImageSet:
    """Images of one model.

    Args:
        entries: (caption with its place in the set, which of its images) -> image.
        seeds: seed of each, where it is recorded.
        duplicates: rows that repeated an image and are not counted.
        manifest: how they were drawn, where it is recorded.
    """

    entries: Mapping[Key, Item]
    seeds: Mapping[Key, int]
    duplicates: int
    manifest: Mapping[str, Any] | None


def read_set(source: Path, prompts: Path | None = None) -> ImageSet:
    """Read the images of a model.

    Args:
        source: folder written by ``eval/generate.py``; or what ``diffalign score`` takes: a JSONL table, a folder.
        prompts: captions of a plain folder.

    Raises:
        UserError: for what cannot be read, or two different images in one place.
    """
    table = source / TABLE if source.is_dir() else source
    drawn = table.is_file() and prompts is None
    items = read_items(table if drawn else source, prompts)
    rows = read_jsonl(table) if drawn else [{} for _ in items]
    entries: dict[Key, Item] = {}
    seeds: dict[Key, int] = {}
    seen: dict[str, list[Path]] = {}
    duplicates = 0
    for item, row in zip(items, rows, strict=True):
        if "index" in row and "sample" in row:
            key = (f"{row['index']}: {item.prompt}", int(row["sample"]))
        else:
            images = seen.setdefault(item.prompt, [])
            key = (item.prompt, images.index(item.image) if item.image in images else len(images))
            images += [item.image] if item.image not in images else []
        if key in entries:
            if entries[key].image != item.image:
                raise UserError(f"{table} has two images for caption {key[0]!r}, image {key[1]}")
            duplicates += 1
            continue
        entries[key] = item
        if "seed" in row:
            seeds[key] = int(row["seed"])
    return ImageSet(entries, seeds, duplicates, generation_of(table.parent))


def pair(candidate: ImageSet, baseline: ImageSet, allow_differences: bool = False) -> tuple[list[Key], list[str]]:
    """Match the images of two models.

    Args:
        candidate, baseline: the models.
        allow_differences: compare although seeds or settings differ.

    Returns:
        the keys of both, caption by caption, and what differs.

    Raises:
        UserError: if the captions are not the same, or seeds or settings differ.
    """
    for one, other, names in (
        (candidate, baseline, "the candidate has {} images that the baseline lacks"),
        (baseline, candidate, "the baseline has {} images that the candidate lacks"),
    ):
        if lone := [key for key in one.entries if key not in other.entries]:
            raise UserError(
                f"{names.format(len(lone))}, first image {lone[0][1]} of {lone[0][0]!r}: "
                "compare images of the same captions"
            )
    unlike = [key for key in candidate.seeds if key in baseline.seeds and candidate.seeds[key] != baseline.seeds[key]]
    changes = [f"{len(unlike)} seeds"] if unlike else []
    if candidate.manifest is not None and baseline.manifest is not None:
        for part in COMPARABLE:
            changes += differences({part: candidate.manifest.get(part, {})}, {part: baseline.manifest.get(part, {})})
    if changes and not allow_differences:
        raise UserError(
            f"the images were not drawn alike ({'; '.join(changes)}); draw both with one preset, or allow differences"
        )
    return list(candidate.entries), changes


@dataclass(frozen=True)
class Comparison:
    """Scores of matched images by one reward.

    Args:
        keys: caption and image of each.
        candidate, baseline: (n,) scores.
        tie_margin: largest difference that is a tie.
    """

    keys: Sequence[Key]
    candidate: Tensor
    baseline: Tensor
    tie_margin: float = 0.0

    @property
    def outcomes(self) -> Tensor:
        """1 where the candidate wins, 0 where it loses, one half for a tie, (n,) float64."""
        return wins(self.candidate, self.baseline, self.tie_margin)

    @property
    def captions(self) -> list[str]:
        """The captions, each once, in order of appearance."""
        return list(dict.fromkeys(caption for caption, _ in self.keys))

    def resolved(self, interval: Interval) -> Interval:
        """Return which interval "auto" stands for here; any other stands for itself."""
        if interval != "auto":
            return interval
        return "exact" if len(self.captions) == len(self.keys) else "bootstrap"

    def rate(self, interval: Interval = "auto") -> Estimate:
        """Return the win rate, every caption of equal weight.

        Args:
            interval: "bootstrap" over captions; "wilson" or "exact" (binomial; ties apart) for one image a caption;
                "auto" chooses.

        Raises:
            UserError: for "wilson" and "exact" with several images a caption, which are not independent.
        """
        captions, interval = self.captions, self.resolved(interval)
        if interval == "bootstrap":
            rows = {caption: [i for i, key in enumerate(self.keys) if key[0] == caption] for caption in captions}
            means = torch.stack([self.outcomes[index].mean() for index in rows.values()])
            return bootstrap_mean(means[None]).of(self.outcomes)
        if len(captions) < len(self.keys):
            raise UserError(f"the interval {interval!r} needs one image a caption; choose bootstrap")
        if interval == "exact":
            return exact_win_rate(self.outcomes)
        return win_rate(self.candidate, self.baseline, self.tie_margin)

    def summary(self, reward: str, interval: Interval = "auto") -> dict[str, Any]:
        """Return what summary files hold.

        Args:
            reward: name of the reward.
            interval: see :meth:`rate`.
        """
        rate, outcomes = self.rate(interval), self.outcomes
        difference = self.candidate.double() - self.baseline.double()
        scale = PREFERENCE_SCALE.get(reward)
        return {
            "reward": reward,
            "n": len(self.captions),
            "comparisons": len(self.keys),
            "win_rate": rate.value,
            "ci_low": rate.low,
            "ci_high": rate.high,
            "shown": str(rate),
            "interval": self.resolved(interval),
            "wins": int((outcomes == 1).sum()),
            "ties": int((outcomes == 0.5).sum()),
            "losses": int((outcomes == 0).sum()),
            "tie_rule": f"a difference of at most {self.tie_margin} is a tie and counts one half",
            "mean_a": self.candidate.double().mean().item(),
            "mean_b": self.baseline.double().mean().item(),
            "mean_difference": difference.mean().item(),
            "soft_win_rate": None if scale is None else torch.sigmoid(scale * difference).mean().item(),
        }

    def rows(self, seeds: Mapping[Key, int]) -> list[dict[str, Any]]:
        """Return one row a comparison."""
        columns = zip(self.keys, self.candidate.tolist(), self.baseline.tolist(), self.outcomes.tolist(), strict=True)
        return [
            {"prompt": key[0], "image": key[1], "seed": seeds.get(key), "score_a": a, "score_b": b, "win": win}
            for key, a, b, win in columns
        ]

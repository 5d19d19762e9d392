"""The one interface of everything that judges an image: training, data synthesis, noise optimisation and evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.rewards.preprocess import to_tensor

Metadata = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RewardInfo:
    """What a reward's number means.

    Args:
        name: what command lines call it; carries the version where versions differ ("hpsv2.1").
        unit: what one unit means.
        range: least and greatest value; infinities where there is no bound.
        differentiable: gradients with respect to the images exist and mean something.
        needs_metadata: the structured description of the caption must be given.
        licence: of the weights.
    """

    name: str
    unit: str
    range: tuple[float, float]
    differentiable: bool
    needs_metadata: bool = False
    licence: str = ""


class Reward(ABC):
    """Judges images against captions; higher is better.

    Example::

        reward = PickScore.load("tiny-pickscore")
        scores = reward.score(images, ["a photo of a red circle"] * len(images))  # (batch,)
    """

    info: RewardInfo
    weights_files: Sequence[Path] = ()
    """Weights that runtimes other than torch read; they are hashed into the records of evaluations."""

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        """Score a batch.

        Args:
            images: (batch, 3, height, width) in [0, 1].
            prompts: one caption an image.
            metadata: one structured description an image, for rewards that need it.

        Returns:
            (batch,) float32, with a graph where the images have one and the reward is differentiable.
        """

    def shares(self) -> Mapping[str, tuple[int, int]]:
        """Return what to report besides scores, so far: name -> (how many, of how many).

        Runs add these up over rewards and processes; the names are explained in ``strategies.metrics``.
        """
        return {}

    def score_pictures(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], metadata: Metadata | None = None
    ) -> Tensor:
        """Score pictures of any sizes, for evaluation, (batch,); together where they are of one size."""
        if len({picture.size for picture in pictures}) == 1:
            return self.score(torch.stack([to_tensor(picture) for picture in pictures]), prompts, metadata)
        return torch.cat(
            [
                self.score(to_tensor(picture)[None], [prompt], metadata and [metadata[row]])
                for row, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True))
            ]
        )


def added_shares(rewards: Iterable[Reward]) -> dict[str, tuple[int, int]]:
    """Add up, by name, what several rewards report."""
    total: dict[str, tuple[int, int]] = {}
    for reward in rewards:
        for name, (part, whole) in reward.shares().items():
            before = total.get(name, (0, 0))
            total[name] = before[0] + part, before[1] + whole
    return total

"""Rewards that prepare pictures and look at the prepared pixels: one arithmetic behind a tensor and a PIL entrance."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from diffalign.rewards.base import Metadata, Reward
from diffalign.rewards.preprocess import Preprocess


class PixelReward(Reward):
    """A reward with preprocessing; a subclass gives ``preprocess`` and :meth:`score_pixels`."""

    preprocess: Preprocess

    @abstractmethod
    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score prepared pixels (batch, 3, size, size), (batch,)."""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        """Score images (batch, 3, height, width) in [0, 1] through differentiable preprocessing, (batch,)."""
        return self.score_pixels(self.preprocess(images), prompts)

    def score_pictures(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], metadata: Metadata | None = None
    ) -> Tensor:
        """Score pictures of any sizes through the official preprocessing, for evaluation, (batch,)."""
        return self.score_pixels(self.preprocess.exact(pictures), prompts)

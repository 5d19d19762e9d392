"""Rewards made of LPIPS distances: diversity among images, and likeness to a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffalign.rewards.base import Reward, RewardInfo
from diffalign.rewards.lpips import Lpips
from diffalign.rewards.pixels import PixelReward
from diffalign.rewards.preprocess import ClipPreprocess
from diffalign.rewards.registry import LoadOptions, register
from diffalign.rewards.scoring import open_picture
from diffalign.rewards.transforms import rows_by_caption

PREPROCESS = ClipPreprocess(256, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""Squares of 256 pixels in [0, 1]: images of any sizes can be compared, and ours enough to be seen at each depth."""


class Diversity(PixelReward):
    """Mean LPIPS distance to the other images of the caption in the batch.

    An image that is alone with its caption is compared with all others of the batch; a single image has diversity 0.

    Args:
        metric: the distance.
    """

    preprocess = PREPROCESS

    def __init__(self, metric: Lpips) -> None:
        self.metric = metric
        self.info = RewardInfo(
            "lpips", "mean LPIPS distance to the images beside it", (0.0, math.inf), True, licence="BSD-2-Clause"
        )

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return mean distances, (batch,)."""
        features = self.metric.features(pixels)
        everyone = list(range(len(pixels)))
        peers = {row: rows if len(rows) > 1 else everyone for rows in rows_by_caption(prompts) for row in rows}
        means = []
        for row in everyone:
            others = [other for other in peers[row] if other != row]
            mine, theirs = [x[row : row + 1] for x in features], [x[others] for x in features]
            means.append(self.metric.distance(mine, theirs).sum() / max(1, len(others)))
        return torch.stack(means)


class Likeness(PixelReward):
    """Negated LPIPS distance to one picture: how little an image has drifted from it.

    Args:
        metric: the distance.
        target: prepared picture (3, side, side).
    """

    preprocess = PREPROCESS

    def __init__(self, metric: Lpips, target: Tensor) -> None:
        self.metric, self.target = metric, metric.features(target[None])
        self.info = RewardInfo(
            "lpips", "LPIPS distance to the picture, negated", (-math.inf, 0.0), True, licence="BSD-2-Clause"
        )

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return negated distances, (batch,)."""
        return -self.metric.distance(self.metric.features(pixels), self.target)


@register("lpips", summary="LPIPS: diversity in a batch, or with @PICTURE likeness to it", paper="arXiv 1801.03924")
def _load(options: LoadOptions) -> Reward:
    metric = Lpips.load().to(options.device)
    if options.source is None:
        return Diversity(metric)
    target = PREPROCESS.exact([open_picture(Path(options.source))])[0]
    return Likeness(metric, target.to(options.device))

"""Small heads over frozen embeddings: the affine stack of two official scorers, and any head of a user."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from diffalign.rewards.base import RewardInfo
from diffalign.rewards.checkpoints import load_strictly
from diffalign.rewards.clip_model import ClipTowers
from diffalign.rewards.pixels import PixelReward
from diffalign.rewards.preprocess import Preprocess

WIDTHS = (1024, 128, 64, 16, 1)
"""Of both official heads, after the embedding."""
_DROPOUTS = (0.2, 0.2, 0.1, 0.0)
"""After each layer but the last; ImageReward and the aesthetic predictor have none before the last layer."""


class AffineHead(nn.Module):
    """Five linear layers without activations; dropout between them in training only.

    Parameters are called as in both official checkpoints: ``layers.{0,2,4,6,7}.{weight,bias}``.

    Args:
        dimensions: of the embedding.
    """

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.dimensions = dimensions
        layers: list[nn.Module] = []
        for index, width in enumerate(WIDTHS):
            layers.append(nn.Linear(dimensions, width))
            if index < len(_DROPOUTS) and _DROPOUTS[index]:
                layers.append(nn.Dropout(_DROPOUTS[index]))
            dimensions = width
        self.layers = nn.Sequential(*layers)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], where: str) -> AffineHead:
        """Build a frozen head from a checkpoint; its width is read from the first layer.

        Raises:
            UserError: if names or shapes are others.
        """
        first = state.get("layers.0.weight")
        head = cls(768 if first is None else first.shape[-1])
        load_strictly(head, state, where)
        return head.requires_grad_(False).eval()

    def forward(self, embeddings: Tensor) -> Tensor:
        """Score embeddings (batch, dimensions), (batch,)."""
        scores: Tensor = self.layers(embeddings)
        return scores.squeeze(-1)


class HeadReward(PixelReward):
    """Any head over unit CLIP embeddings of the image; the caption is not looked at.

    Args:
        towers: the CLIP model.
        preprocess: its image preprocessing.
        head: (batch, dimensions) -> (batch,), a module or any function of tensors.
        info: what its number means.
    """

    def __init__(
        self, towers: ClipTowers, preprocess: Preprocess, head: Callable[[Tensor], Tensor], info: RewardInfo
    ) -> None:
        self.towers, self.preprocess, self.head, self.info = towers, preprocess, head, info

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the head's scores, (batch,)."""
        scores = self.head(self.towers.image(pixels))
        return scores if scores.dtype == torch.float64 else scores.float()

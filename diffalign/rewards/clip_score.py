"""CLIPScore (Hessel et al., arXiv 2104.08718): agreement of image and caption. State the backbone with the number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from diffalign.errors import unknown
from diffalign.rewards.base import Reward, RewardInfo
from diffalign.rewards.clip_model import ClipTowers
from diffalign.rewards.pickscore import PickScore
from diffalign.rewards.pixels import PixelReward
from diffalign.rewards.preprocess import Preprocess
from diffalign.rewards.registry import LoadOptions, register

Convention = Literal["cosine", "percent", "paper"]
OFFICIAL = "openai/clip-vit-large-patch14"
_PREFIX = "A photo depicts "
"""Put before captions by the paper."""


class ClipScore(PixelReward):
    """Cosine of caption and image in one of three conventions.

    Args:
        towers: the CLIP model with its tokenizer.
        preprocess: image preprocessing.
        convention: "cosine" unclipped; "percent" ``100 max(cos, 0)`` as torchmetrics; "paper" ``2.5 max(cos, 0)``
            with the paper's words before the caption.
    """

    def __init__(self, towers: ClipTowers, preprocess: Preprocess, convention: Convention = "percent") -> None:
        ranges = {"cosine": (-1.0, 1.0), "percent": (0.0, 100.0), "paper": (0.0, 2.5)}
        if convention not in ranges:
            raise unknown("convention of CLIPScore", convention, get_args(Convention))
        self.towers, self.preprocess, self.convention = towers, preprocess, convention
        units = {"cosine": "cosine", "percent": "100 x cosine", "paper": "2.5 x cosine"}
        self.info = RewardInfo("clip", units[convention], ranges[convention], differentiable=True, licence="MIT")

    @classmethod
    def load(
        cls,
        source: str = OFFICIAL,
        convention: Convention = "percent",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ClipScore:
        """Load a transformers CLIP model by hub name, local folder or bundled name."""
        loaded = PickScore.load(source, device=device, dtype=dtype)
        return cls(loaded.towers, loaded.preprocess, convention)

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores, (batch,)."""
        captions = [_PREFIX + prompt for prompt in prompts] if self.convention == "paper" else prompts
        cosine = (self.towers.image(pixels) * self.towers.text(captions)).sum(-1)
        if self.convention == "cosine":
            return cosine
        return (100.0 if self.convention == "percent" else 2.5) * cosine.clamp(min=0)


@register("clip", summary="100 x cosine of caption and image (CLIP ViT-L/14)", paper="arXiv 2104.08718")
def _load(options: LoadOptions) -> Reward:
    return ClipScore.load(options.source or OFFICIAL, device=options.device, dtype=options.dtype)

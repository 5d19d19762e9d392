"""HPSv2 and HPSv2.1 (Wu et al., arXiv 2306.09341; official code tgxs002/HPSv2, Apache-2.0).

The cosine of open_clip's ViT-H-14, fine-tuned on preferences; the logit scale is not used. Benchmarks print 100 times
it. Numbers of the two versions are not comparable.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.base import Reward, RewardInfo
from diffalign.rewards.checkpoints import read_state
from diffalign.rewards.clip_model import ClipTowers
from diffalign.rewards.hub import checkpoint_file
from diffalign.rewards.open_clip_weights import architecture, clip_from_state, clip_tokenizer
from diffalign.rewards.pixels import PixelReward
from diffalign.rewards.preprocess import PadPreprocess
from diffalign.rewards.registry import LoadOptions, register

ARCHITECTURE = "ViT-H-14"
OFFICIAL = {"hpsv2": "xswu/HPSv2/HPS_v2_compressed.pt", "hpsv2.1": "xswu/HPSv2/HPS_v2.1_compressed.pt"}


class HPSv2(PixelReward):
    """Cosine of caption and image; build it with :meth:`load`.

    Args:
        towers: the CLIP model with its tokenizer.
        name: "hpsv2" or "hpsv2.1".
    """

    def __init__(self, towers: ClipTowers, name: str = "hpsv2") -> None:
        self.towers = towers
        self.preprocess = PadPreprocess(towers.model.config.vision_config.image_size)
        self.info = RewardInfo(name, "cosine", (-1.0, 1.0), differentiable=True, licence="Apache-2.0")

    @classmethod
    def load(
        cls,
        source: str | None = None,
        name: str = "hpsv2",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        config: Mapping[str, Any] | None = None,
    ) -> HPSv2:
        """Load an official checkpoint.

        Args:
            source: checkpoint file, or USER/REPOSITORY/FILE on the hub; the official one of the version by default.
            name: the version, "hpsv2" or "hpsv2.1".
            device, dtype: where and how the towers run.
            config: open_clip's configuration of the architecture; ViT-H-14 by default.

        Raises:
            UserError: if the file is absent or of another architecture.
        """
        path = checkpoint_file(source or OFFICIAL[name])
        model = clip_from_state(read_state(path), config or architecture(ARCHITECTURE), str(path))
        return cls(ClipTowers(model.to(device, dtype), clip_tokenizer()), name)

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return cosines, (batch,)."""
        # open_clip's tokenizer resolves HTML entities, twice for captions that were escaped twice.
        captions = [html.unescape(html.unescape(prompt)) for prompt in prompts]
        return (self.towers.image(pixels) * self.towers.text(captions)).sum(-1)


@register("hpsv2", summary="human preference score v2.0: cosine of a fine-tuned ViT-H-14", paper="arXiv 2306.09341")
def _load_first(options: LoadOptions) -> Reward:
    return HPSv2.load(options.source, "hpsv2", options.device, options.dtype)


@register("hpsv2.1", summary="human preference score v2.1, trained on cleaner pairs", paper="arXiv 2306.09341")
def _load_second(options: LoadOptions) -> Reward:
    return HPSv2.load(options.source, "hpsv2.1", options.device, options.dtype)

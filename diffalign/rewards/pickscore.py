"""PickScore (Kirstain et al., arXiv 2305.01569; official code yuvalkirstain/PickScore, MIT) and its bundled sibling.

A CLIP model whose scaled cosine is a human preference logit: ``exp(logit_scale) * <text, image>``. A difference of one
point is a preference of 73 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.bundled import bundled_path, is_bundled
from diffalign.rewards.base import Reward, RewardInfo
from diffalign.rewards.clip_model import ClipTowers
from diffalign.rewards.hub import pretrained
from diffalign.rewards.pixels import PixelReward
from diffalign.rewards.preprocess import ClipPreprocess
from diffalign.rewards.registry import LoadOptions, register

OFFICIAL_WEIGHTS = "yuvalkirstain/PickScore_v1"
OFFICIAL_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore(PixelReward):
    """Scores with any transformers ``CLIPModel``; build it with :meth:`load`.

    Args:
        towers: the CLIP model with its tokenizer.
        preprocess: image preprocessing.
        name: reported name.
    """

    def __init__(self, towers: ClipTowers, preprocess: ClipPreprocess, name: str = "pickscore") -> None:
        self.towers, self.preprocess = towers, preprocess
        self.info = RewardInfo(
            name, "preference logit (100 x cosine)", (-100.0, 100.0), differentiable=True, licence="MIT"
        )

    @classmethod
    def load(
        cls,
        weights: str = OFFICIAL_WEIGHTS,
        processor: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> PickScore:
        """Load by hub name, local folder, or bundled name.

        Args:
            weights: where the CLIPModel is; the official weights by default.
            processor: where tokenizer and image processor are; beside the weights unless these are the official ones.
            device, dtype: where and how the towers run; the final product is always float32.

        Raises:
            UserError: if the model, its tokenizer or its image processor cannot be loaded.
        """
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        name = "pickscore" if weights == OFFICIAL_WEIGHTS else Path(weights).name
        source = str(bundled_path(weights)) if is_bundled(weights) else weights
        processor = processor or (OFFICIAL_PROCESSOR if weights == OFFICIAL_WEIGHTS else source)
        with pretrained("the CLIP model", source):
            model: Any = CLIPModel.from_pretrained(source, dtype=dtype)
        with pretrained("the image processor and tokenizer", processor):
            # The settings alone: the processor class itself may want torchvision.
            settings, _ = CLIPImageProcessor.get_image_processor_dict(processor)
            _require_vocabulary(processor)
            tokenizer = AutoTokenizer.from_pretrained(processor)
        towers = ClipTowers(model.to(device), tokenizer)
        return cls(towers, ClipPreprocess.from_config(settings), name)

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return one preference logit an image, (batch,)."""
        return preference_logits(self.towers.image(pixels), self.towers.text(prompts), self.towers.logit_scale)

    def score_matrix(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score every image for every caption, (captions, images); a softmax over a row is the preference."""
        return self.logits(self.towers.image(self.preprocess(images)), self.towers.text(prompts))

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """Return the logits of all unit embeddings of images for all of captions, (captions, images)."""
        return self.towers.logit_scale * text @ image.T


def _require_vocabulary(source: str) -> None:
    """Refuse a folder without a vocabulary: transformers makes an empty tokenizer of it, and scores mean nothing."""
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError("it has no tokenizer.json and no vocab.json")


def preference_logits(image: Tensor, text: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Scaled cosine of unit embeddings (..., dimensions), row by row, (...)."""
    return logit_scale * (image * text).sum(-1)


@register("pickscore", summary="human preference logit of a CLIP ViT-H/14", paper="arXiv 2305.01569")
def _load(options: LoadOptions) -> Reward:
    return PickScore.load(options.source or OFFICIAL_WEIGHTS, device=options.device, dtype=options.dtype)

"""PickScore (Kirstain et al., arXiv 2305.01569; official code yuvalkirstain/PickScore, MIT) and its bundled sibling.

A CLIP model whose scaled cosine is a human preference logit: ``exp(logit_scale) * <text, image>``. A difference of one
point is a preference of 73 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.bundled import bundled_path, is_bundled
from diffalign.rewards.base import Metadata, Reward, RewardInfo
from diffalign.rewards.preprocess import ClipPreprocess
from diffalign.rewards.registry import LoadOptions, register

OFFICIAL_WEIGHTS = "yuvalkirstain/PickScore_v1"
OFFICIAL_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore(Reward):
    """Scores with any transformers ``CLIPModel``; build it with :meth:`load`.

    Args:
        model: the CLIP model, kept frozen.
        tokenizer: its tokenizer.
        preprocess: image preprocessing.
        name: reported name.
    """

    def __init__(self, model: Any, tokenizer: Any, preprocess: ClipPreprocess, name: str = "pickscore") -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer, self.preprocess = tokenizer, preprocess
        self.info = RewardInfo(
            name, "preference logit (100 x cosine)", (-100.0, 100.0), differentiable=True, licence="MIT"
        )
        self._text_features: dict[str, Tensor] = {}

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
        """
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        name = "pickscore" if weights == OFFICIAL_WEIGHTS else Path(weights).name
        source = str(bundled_path(weights)) if is_bundled(weights) else weights
        processor = processor or (OFFICIAL_PROCESSOR if weights == OFFICIAL_WEIGHTS else source)
        model: Any = CLIPModel.from_pretrained(source, dtype=dtype)
        # The settings alone: the processor class itself may want torchvision.
        settings, _ = CLIPImageProcessor.get_image_processor_dict(processor)
        preprocess = ClipPreprocess.from_config(settings)
        return cls(model.to(device), AutoTokenizer.from_pretrained(processor), preprocess, name)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        """Return one preference logit an image, (batch,) float32."""
        reference = self.model.logit_scale
        pixels = self.preprocess(images.to(reference.device)).to(reference.dtype)
        image_features = F.normalize(projected(self.model.get_image_features(pixel_values=pixels)).float(), dim=-1)
        text_features = torch.stack([self._text(prompt) for prompt in prompts])
        return reference.exp().float() * (image_features * text_features).sum(-1)

    @torch.no_grad()
    def _text(self, prompt: str) -> Tensor:
        """Encode a caption once; rewards see the same captions again and again."""
        if prompt not in self._text_features:
            tokens = self.tokenizer([prompt], padding="max_length", truncation=True, return_tensors="pt")
            tokens = tokens.to(self.model.logit_scale.device)
            features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            self._text_features[prompt] = F.normalize(projected(features).float(), dim=-1)[0]
        return self._text_features[prompt]


def projected(features: Any) -> Tensor:
    """Take the projected embedding, whichever form this version of transformers returns it in."""
    return features if isinstance(features, Tensor) else features.pooler_output


@register("pickscore", summary="human preference logit of a CLIP ViT-H/14", paper="arXiv 2305.01569")
def _load(options: LoadOptions) -> Reward:
    return PickScore.load(options.source or OFFICIAL_WEIGHTS, device=options.device, dtype=options.dtype)

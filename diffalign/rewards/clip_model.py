"""The two towers of a CLIP model, shared by all scorers built on one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_CACHED = 20_000
"""Captions kept: at 1,024 float32 numbers each some 80 MB."""


def projected(features: Any) -> Tensor:
    """Take the projected embedding, whichever form this version of transformers returns it in."""
    return features if isinstance(features, Tensor) else features.pooler_output


def unit(features: Tensor) -> Tensor:
    """Scale rows to length 1, in float32 or wider: half precision is too coarse to rank by."""
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


class ClipTowers:
    """A frozen transformers ``CLIPModel`` with its tokenizer.

    Args:
        model: the model.
        tokenizer: called as transformers' tokenizers are.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.requires_grad_(False).eval(), tokenizer
        self._known: dict[str, Tensor] = {}

    @property
    def logit_scale(self) -> Tensor:
        """Factor of cosines, (), float32 or wider."""
        scale: Tensor = self.model.logit_scale
        return (scale if scale.dtype == torch.float64 else scale.float()).exp()

    def image(self, pixels: Tensor) -> Tensor:
        """Return unit embeddings of prepared pixels (batch, 3, side, side), (batch, dimensions)."""
        place = self.model.logit_scale
        return unit(projected(self.model.get_image_features(pixel_values=pixels.to(place.device, place.dtype))))

    @torch.no_grad()
    def tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return unit embeddings of tokens (batch, length), (batch, dimensions)."""
        device = self.model.logit_scale.device
        features = self.model.get_text_features(
            input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)
        )
        return unit(projected(features))

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Return unit embeddings of captions, (batch, dimensions); rewards see the same captions again and again.

        Each is encoded alone: beside others it would be rounded differently, and a resumed run would not repeat.
        """
        if missing := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]:
            if len(self._known) + len(missing) > _MAX_CACHED:
                self._known.clear()
                missing = list(dict.fromkeys(prompts))
            for prompt in missing:
                alone = self.tokenizer([prompt], padding="max_length", truncation=True, return_tensors="pt")
                self._known[prompt] = self.tokens(alone.input_ids, alone.attention_mask)[0]
        return torch.stack([self._known[prompt] for prompt in prompts])

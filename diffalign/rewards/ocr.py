"""Text rendering judged by reading it (Flow-GRPO's OCR reward, arXiv 2505.05470; official code yifan123/flow_grpo).

The target is what the caption has between its first pair of double quotes. 1 if it is read, blanks and case aside, else
one minus the edit distance over the target's length, the distance capped at that length.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import MissingExtra, UserError
from diffalign.rewards.base import Metadata, Reward, RewardInfo
from diffalign.rewards.registry import LoadOptions, no_source, register

Piece = tuple[str, float]
"""Recognised text and its confidence in [0, 1]."""
Recogniser = Callable[[Any], Sequence[Piece]]
"""Picture (height, width, 3) uint8 RGB -> pieces in reading order."""


class OcrReward(Reward):
    """Reads images and compares with the quoted text.

    Args:
        recogniser: reads a picture; what it raises counts as nothing read.
    """

    def __init__(self, recogniser: Recogniser) -> None:
        self.recogniser = recogniser
        self.info = RewardInfo("ocr", "share of the quoted text read", (0.0, 1.0), False, licence="Apache-2.0")
        self.failures = 0

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        """Return shares, (batch,) float32 on the images' device.

        Raises:
            UserError: if a caption quotes nothing.
        """
        targets = [quoted(prompt) for prompt in prompts]
        pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        shares = [self._read(image, target) for image, target in zip(pixels, targets, strict=True)]
        return torch.tensor(shares, device=images.device)

    def _read(self, picture: Any, target: str) -> float:
        try:
            pieces = self.recogniser(picture)
        except Exception:
            # A recogniser may fail on a degenerate picture; as in the official code that picture gets 0.
            self.failures += 1
            return 0.0
        return text_score(target, pieces)


def quoted(prompt: str) -> str:
    """Return what a caption has between its first pair of double quotes.

    Raises:
        UserError: if there is no pair.
    """
    parts = prompt.split('"')
    if len(parts) < 3:
        raise UserError(f"the OCR reward needs the wanted text in double quotes; the caption is: {prompt}")
    return parts[1]


def text_score(target: str, pieces: Sequence[Piece]) -> float:
    """Compare recognised pieces with the target; 1 is perfect, 0 nothing alike."""
    wanted = target.replace(" ", "").lower()
    read = "".join(text for text, confidence in pieces if confidence > 0).replace(" ", "").lower()
    if wanted in read:
        return 1.0
    return 1.0 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def edit_distance(left: str, right: str) -> int:
    """Count the insertions, deletions and replacements that turn one text into the other (Levenshtein)."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def rapidocr_recogniser() -> Recogniser:
    """Build a recogniser on the package rapidocr, which carries its models (PP-OCR, Apache-2.0).

    Raises:
        MissingExtra: if the package is absent.
    """
    try:
        from rapidocr import RapidOCR
    except ImportError as problem:
        raise MissingExtra("rapidocr", "scorers", "the reward 'ocr'") from problem
    engine = RapidOCR()

    def read(picture: Any) -> list[Piece]:
        # Arrays are taken as BGR.
        result = engine(picture[..., ::-1].copy())
        return list(zip(result.txts or (), result.scores or (), strict=True))

    return read


@register("ocr", summary="share of the caption's quoted text that can be read", paper="arXiv 2505.05470")
def _load(options: LoadOptions) -> Reward:
    no_source("ocr", options)
    reward = OcrReward(rapidocr_recogniser())
    spec = importlib.util.find_spec("rapidocr")
    if spec is not None and spec.origin is not None:
        reward.weights_files = sorted(Path(spec.origin).parent.rglob("*.onnx"))
    return reward

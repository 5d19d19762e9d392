"""Renderings as tensors, and tensors as pictures."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffalign.world.grammar import PromptRecord, draw_prompt
from diffalign.world.render import render


def to_tensor(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Turn pictures (height, width, 3), uint8, into (n, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(images: Tensor) -> NDArray[np.uint8]:
    """Turn (n, 3, height, width) in [-1, 1] into pictures (n, height, width, 3), uint8."""
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().numpy()


def rendered(count: int, rng: random.Random) -> tuple[list[PromptRecord], Tensor]:
    """Draw training captions with one true picture each, (count, 3, 64, 64) in [-1, 1]."""
    records = [draw_prompt("train", rng) for _ in range(count)]
    return records, to_tensor([render(record.metadata, rng) for record in records])

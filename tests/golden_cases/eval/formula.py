"""Inputs and weights that files of scorers give by a formula."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffalign.rewards.heads import AffineHead


def wave(shape: Sequence[int], rate: float, shift: float) -> Tensor:
    """``flat[k] = sin(rate k + shift)``, float64."""
    return torch.sin(rate * torch.arange(math.prod(shape), dtype=torch.float64) + shift).view(*shape)


def head_state(wanted: Mapping[str, Tensor], keys: Sequence[str], shift: float) -> dict[str, Tensor]:
    """Weights of an affine head: waves, scaled by 1.5 over the root of the fan-in, biases by 0.1."""
    state = {}
    for index, key in enumerate(sorted(keys)):
        shape = wanted[key].shape
        scale = 1.5 / math.sqrt(shape[1]) if len(shape) > 1 else 0.1
        state[key] = wave(shape, 0.731, 0.37 * index + shift) * scale
    return state


def formula_head(keys: Sequence[str], shift: float) -> AffineHead:
    """The head of a case."""
    return AffineHead.from_state(head_state(AffineHead(768).state_dict(), keys, shift), "the case")

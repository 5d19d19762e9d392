"""How well scores reproduce human rankings: the accuracies that papers of scorers report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def rank_positions(scores: Tensor) -> Tensor:
    """Rank of each image by score, 1 the best; ties in the order given, (n,) int64."""
    return scores.argsort(descending=True, stable=True).argsort() + 1


def inversion_score(predicted: Sequence[int], true: Sequence[int]) -> float:
    """Share of pairs that two rankings of the same images order alike (HPSv2's preference accuracy).

    Args:
        predicted, true: rank of each image.
    """
    count = len(true)
    inverted = sum(
        (predicted[i] - predicted[j]) * (true[i] - true[j]) < 0 for i in range(count) for j in range(i + 1, count)
    )
    return 1 - inverted / (count * (count - 1) / 2)


def pair_accuracy(scores: Sequence[float], true: Sequence[int]) -> float:
    """Share of pairs not tied in the truth that scores order alike (ImageReward's test); a tied score is wrong.

    Args:
        scores: higher is better.
        true: rank of each image, 1 the best.

    Returns:
        the share; NaN if every pair is tied in the truth.
    """
    pairs = [(i, j) for i in range(len(true)) for j in range(len(true)) if true[i] < true[j]]
    return sum(scores[i] > scores[j] for i, j in pairs) / len(pairs) if pairs else float("nan")


def accuracy_with_ties(probabilities: Tensor, labels: Tensor, threshold: float) -> float:
    """PickScore's test: half a point where exactly one of label and prediction is a tie.

    Args:
        probabilities: (n, 2) of the two images.
        labels: (n,) 1 if the first is preferred, 0 if the second, 1/2 for a tie.
        threshold: probabilities no further apart are a predicted tie.
    """
    gap = probabilities[:, 0] - probabilities[:, 1]
    predicted = torch.where(gap.abs() <= threshold, 0.5, (gap > 0).to(gap.dtype))
    points = (predicted == labels).double() + 0.5 * ((predicted == 0.5) ^ (labels == 0.5)).double()
    return points.mean().item()


def best_threshold(probabilities: Tensor, labels: Tensor, thresholds: Sequence[float]) -> float:
    """Choose the first threshold of greatest accuracy, on validation data."""
    return max(thresholds, key=lambda threshold: accuracy_with_ties(probabilities, labels, threshold))


@dataclass(frozen=True)
class StyleSummary:
    """HPSv2's benchmark.

    Args:
        styles: style -> mean, and population standard deviation of the means of its chunks.
        average: mean over all images.
    """

    styles: Mapping[str, tuple[float, float]]
    average: float


def style_summary(scores: Mapping[str, Sequence[float]], chunk: int = 80) -> StyleSummary:
    """Summarise scores as HPSv2's benchmark does.

    Args:
        scores: style -> 100 x cosine of each image, in the order of the prompts.
        chunk: images in a chunk; the official 800 a style make ten.
    """
    styles = {}
    for style, values in scores.items():
        means = [statistics.fmean(values[start : start + chunk]) for start in range(0, len(values), chunk)]
        styles[style] = (statistics.fmean(means), statistics.pstdev(means))
    return StyleSummary(styles, statistics.fmean([value for values in scores.values() for value in values]))


def label_mass(scores: Tensor, labels: Tensor) -> Tensor:
    """Share of each label that lies on the higher score (PickScore's accuracy while training).

    Args:
        scores: (batch, 2) of two images.
        labels: (batch,) 1 if the first is preferred, 0 if the second, 1/2 for a tie.

    Returns:
        (batch,): 1 right, 0 wrong, 1/2 for a tie in label or scores.
    """
    first = (scores[:, 0] > scores[:, 1]).to(labels.dtype) + 0.5 * (scores[:, 0] == scores[:, 1]).to(labels.dtype)
    return labels * first + (1 - labels) * (1 - first)

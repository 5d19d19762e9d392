"""Paired comparison of two sets of images: same captions, same seeds, one score each. Pure functions.

Ties count one half. Intervals are at 95 %: Wilson (which admits the halves that ties count) for a
single run, the exact binomial one of its decided comparisons, and a bootstrap over captions *and* training seeds where
a method was trained several times or a caption has several images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Z95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Args:
        value, low, high: the mean, and the ends of its interval.
        tied: of a win rate of which no comparison was decided, the number of comparisons: its ends say nothing. Else 0.
    """

    value: float
    low: float
    high: float
    tied: int = 0

    def __str__(self) -> str:
        return self.shown()

    def shown(self, sign: str = "") -> str:
        """Return the figures as text, with ``sign`` "+" also where they are positive."""
        if self.tied:
            return f"all {self.tied} tied"
        return f"{self.value:{sign}.3f} [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"

    def of(self, outcomes: Tensor) -> Estimate:
        """Return the estimate, marked where all of the outcomes that it is the rate of are ties."""
        return replace(self, tied=outcomes.numel() if bool((outcomes == 0.5).all()) else 0)


def wins(candidate: Tensor, baseline: Tensor, tie_margin: float = 0.0) -> Tensor:
    """Return 1 where the candidate's score is higher, 0 where lower, one half where they tie.

    Args:
        candidate, baseline: scores of the same captions and seeds, same shape.
        tie_margin: largest absolute difference that counts as a tie.
    """
    if candidate.shape != baseline.shape:
        raise ValueError(f"scores must be paired: {tuple(candidate.shape)} against {tuple(baseline.shape)}")
    difference = candidate.double() - baseline.double()
    tie = difference.abs() <= tie_margin
    return torch.where(tie, torch.full_like(difference, 0.5), (difference > 0).double())


def win_rate(candidate: Tensor, baseline: Tensor, tie_margin: float = 0.0) -> Estimate:
    """Win rate of one run against its baseline with a Wilson interval.

    Args:
        candidate, baseline: (n,) scores.
    """
    outcome = wins(candidate, baseline, tie_margin)
    n, p = outcome.numel(), outcome.mean().item()
    center = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * (p * (1 - p) / n + Z95**2 / (4 * n * n)) ** 0.5 / (1 + Z95**2 / n)
    return Estimate(p, max(0.0, center - half), min(1.0, center + half)).of(outcome)


def bootstrap_mean(values: Tensor, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean of values over runs and captions with a two-level percentile bootstrap.

    Args:
        values: (runs, captions); runs and captions are resampled independently with replacement. With one run only
            captions are.
        resamples: bootstrap samples.
        seed: of the resampling.
    """
    runs, captions = values.shape
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(resamples, dtype=torch.float64)
    for index in range(resamples):
        rows = torch.randint(runs, (runs,), generator=generator)
        columns = torch.randint(captions, (captions,), generator=generator)
        means[index] = values[rows][:, columns].double().mean()
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(values.double().mean().item(), low, high)


def exact_win_rate(outcomes: Tensor) -> Estimate:
    """Win rate with the exact binomial (Clopper-Pearson) interval of the decided comparisons; ties keep their halves.

    Args:
        outcomes: (n,) of 1, 0 and one half, of independent comparisons: one image a caption.
    """
    n, ties = outcomes.numel(), int((outcomes == 0.5).sum())
    won, decided = int((outcomes == 1).sum()), n - ties
    low, high = clopper_pearson(won, decided) if decided else (0.5, 0.5)
    rate = outcomes.double().mean().item()
    return Estimate(rate, (low * decided + ties / 2) / n, (high * decided + ties / 2) / n).of(outcomes)


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a binomial share.

    Args:
        successes, trials: counts, ``trials`` positive.
        level: of confidence.
    """
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else _solve(lambda p: 1 - _binomial_cdf(successes - 1, trials, p) - tail)
    high = 1.0 if successes == trials else _solve(lambda p: tail - _binomial_cdf(successes, trials, p))
    return low, high


def _binomial_cdf(count: int, trials: int, p: float) -> float:
    """Probability of at most ``count`` successes, for p strictly between 0 and 1."""
    k = torch.arange(count + 1, dtype=torch.float64)
    n = torch.tensor(float(trials), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return (ways + k * math.log(p) + (n - k) * math.log1p(-p)).exp().sum().item()


def _solve(increasing: Callable[[float], float]) -> float:
    """Zero in (0, 1) of an increasing function, by bisection to double precision."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if increasing(middle) > 0 else (middle, high)
    return (low + high) / 2

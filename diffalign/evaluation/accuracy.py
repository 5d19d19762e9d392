"""Shares of what was judged correct, which benchmarks report by task."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accuracy:
    """What was judged correct of a task.

    Args:
        correct, total: counts of whatever the benchmark judges (images, points).
    """

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of what is correct."""
        return self.correct / self.total

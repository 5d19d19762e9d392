"""Metrics: summed on the device, brought to the host once a logging interval, averaged over examples and processes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffalign.training.processes import Processes
from diffalign.training.step import StepResult


class Metrics:
    """Averages of a logging interval.

    Args:
        processes: whose examples count.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._reset()

    def add(self, result: StepResult, seconds: float) -> None:
        """Enter a step."""
        for name, value in result.account.sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._examples += result.account.examples
        self._weight += result.account.weight
        self._gradient_norms.append(result.gradient_norm)
        self._skipped += not result.applied
        self._learning_rate = result.learning_rate
        self._seconds += seconds

    def read(self) -> dict[str, float]:
        """Return the interval's averages, the same on every process, and start a new interval; all call it together.

        The loss is divided as its gradient was: examples that were dropped and still count have a loss of 0. Besides
        what the method reports: ``grad_norm`` (mean over steps), ``learning_rate`` (of the last one),
        ``skipped_steps`` and ``examples_per_second`` over all processes.
        """
        parts = self._processes.exchange((_on_host(self._sums), self._examples))
        examples = sum(count for _, count in parts)
        counts = {"loss": self._weight}
        averages = {
            name: sum(sums.get(name, 0.0) for sums, _ in parts) / counts.get(name, max(examples, 1))
            for name in dict.fromkeys(name for sums, _ in parts for name in sums)
        }
        averages |= {
            "grad_norm": sum(self._gradient_norms) / max(len(self._gradient_norms), 1),
            "learning_rate": self._learning_rate,
            "skipped_steps": float(self._skipped),
            "examples_per_second": examples / self._seconds if self._seconds else 0.0,
        }
        self._reset()
        return averages

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._examples, self._weight = 0, 0.0
        self._gradient_norms: list[float] = []
        self._skipped = 0
        self._learning_rate = 0.0
        self._seconds = 0.0


def _on_host(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Bring scalars to the host by name, those of each device in one copy."""
    values: dict[str, float] = {}
    for device in dict.fromkeys(value.device for value in sums.values()):
        here = {name: value for name, value in sums.items() if value.device == device}
        values |= dict(zip(here, torch.stack(list(here.values())).tolist(), strict=True))
    return dict(sorted(values.items()))


def rounded(values: Mapping[str, float], digits: int = 8) -> dict[str, float]:
    """Round to significant digits, for logs that people read."""
    return {name: float(f"{value:.{digits}g}") for name, value in values.items()}

"""Exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from diffalign.training.sharding import like
from diffalign.training.trainables import Trainables


class MovingAverage:
    """``average <- decay * average + (1 - decay) * weights`` after each step.

    The decay is warmed up as ``min(decay, (1 + step) / (10 + step))``, so that early averages are not the start.

    Args:
        trainables: what is averaged.
        decay: weight of the past.
    """

    def __init__(self, trainables: Trainables, decay: float) -> None:
        self._trainables = trainables
        self._decay = decay
        self._average = {name: value.clone() for name, value in trainables.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the present weights in.

        Args:
            step: optimizer steps done, this one included.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        weights = self._trainables.state_dict()
        torch._foreach_lerp_(list(self._average.values()), list(weights.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in place of the weights; they come back."""
        with self._trainables.holding(self._average):
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """The average by name."""
        return dict(self._average)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave, whole or in shards."""
        for name, value in self._average.items():
            value.copy_(like(state[name], value))

"""Ending a run whose held-out reward no longer rises: from then on it learns to please the trained one only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from diffalign.errors import RunStopped
from diffalign.training.sharding import from_host, like, to_host
from diffalign.training.trainables import Trainables


class EarlyStop:
    """Watches one number, and remembers the weights of its best moment.

    Args:
        trainables: whose values are remembered.
        patience: looks in a row without a new best after which the run is over.
    """

    def __init__(self, trainables: Trainables, patience: int) -> None:
        self._trainables = trainables
        self._patience = patience
        self._best = -math.inf
        self._best_step = 0
        self._waited = 0
        self._weights: dict[str, Tensor] = {}  # in main memory; of weights in shards, this process's parts

    @property
    def over(self) -> bool:
        """Whether the run should end."""
        return self._waited >= self._patience

    @property
    def best_step(self) -> int:
        """The step of the best value; its weights are the ones that are kept."""
        return self._best_step

    def look(self, step: int, value: float | None) -> None:
        """Take a value in, measured with the weights that the parameters hold now; None where nothing is watched.

        Raises:
            RunStopped: if it is not finite: such values cannot be compared.
        """
        if value is None:
            return
        if not math.isfinite(value):
            raise RunStopped(
                f"the held-out reward after step {step} is {value}: either it does not work on such images, or the "
                "images are broken; see the validation grid"
            )
        if value > self._best:
            self._best, self._best_step, self._waited = value, step, 0
            self._weights = {name: to_host(weight) for name, weight in self._trainables.state_dict().items()}
        else:
            self._waited += 1

    @contextmanager
    def best(self) -> Iterator[None]:
        """Put the best weights in place of the present ones; those come back."""
        with self._trainables.holding(self._best_weights()):
            yield

    def _best_weights(self) -> dict[str, Tensor]:
        named = self._trainables.named
        return {name: from_host(weight, named[name]) for name, weight in self._weights.items()}

    def describe(self) -> str:
        """Say why the run ended and what is kept."""
        return (
            f"the held-out reward has not exceeded its value after step {self._best_step} ({self._best:.4g}) for "
            f"{self._waited} validations: the weights of that step are kept"
        )

    def state_dict(self) -> dict[str, Any]:
        """All of it; empty while nothing is watched."""
        if not self._weights:
            return {}
        weights = self._best_weights()
        return {"best": self._best, "step": self._best_step, "waited": self._waited, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        if state:
            self._best, self._best_step, self._waited = state["best"], state["step"], state["waited"]
            named = self._trainables.named
            self._weights = {name: to_host(like(weight, named[name])) for name, weight in state["weights"].items()}

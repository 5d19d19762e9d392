"""The loader and the encoder as one stream of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from diffalign.batch import Batch
from diffalign.data.loader import ExampleLoader, MicroBatch

Encode = Callable[[MicroBatch[Any]], Batch]
"""Turns examples and their seeds into a batch on the policy's device."""


class EncodedSource:
    """Batches of this process, encoded as they are asked for.

    Args:
        loader: order, seeds and position.
        encode: turns each micro-batch into a batch.
        left_out: of a stream: counts what this process could not use so far.
    """

    def __init__(
        self,
        loader: ExampleLoader[Any],
        encode: Encode,
        left_out: Callable[[], Mapping[str, int]] | None = None,
    ) -> None:
        self._loader = loader
        self._encode = encode
        self.left_out = left_out

    @property
    def completed_epochs(self) -> int:
        """Passes over the data that have been handed out to the end."""
        return self._loader.completed_epochs

    @property
    def steps_per_epoch(self) -> int | None:
        """Global batches in one pass over the data; None for a stream."""
        return self._loader.steps_per_epoch

    def __iter__(self) -> Iterator[list[Batch]]:
        return self._loader.steps(self._encode)

    def state_dict(self) -> dict[str, Any]:
        """Position in the data."""
        return self._loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position."""
        self._loader.load_state_dict(state)

"""Several processes as threads of one: each does the same work, and meets the others where processes would."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffalign.training.processes import Processes

T = TypeVar("T")


class Meeting(Processes):
    """Processes seen by one of them."""

    rank = 0
    world_size = 1
    device = torch.device("cpu")

    def __init__(self, rank: int, boxes: list[Any], barrier: Barrier) -> None:
        self.rank, self.world_size = rank, len(boxes)
        self._boxes, self._barrier = boxes, barrier

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def exchange(self, value: Any) -> list[Any]:
        self._boxes[self.rank] = value
        self._barrier.wait()
        found = list(self._boxes)
        self._barrier.wait()
        return found

    def wait(self) -> None:
        self._barrier.wait()

    def table(self, row: list[float]) -> list[list[float]]:
        return self.exchange(row)

    def sum(self, value: Tensor) -> Tensor:
        return torch.stack(self.exchange(value)).sum(dim=0)


def meet(world_size: int, work: Callable[[Meeting], T]) -> list[T]:
    """Return what the work came to in each process."""
    boxes: list[Any] = [None] * world_size
    barrier = Barrier(world_size, timeout=60)
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: work(Meeting(rank, boxes, barrier)), range(world_size)))

"""A model of two parameters and data for it: small enough that every gradient can be written down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.batch import Batch
from diffalign.diffusion.random import derive_seed, randn_rows
from diffalign.policies.base import BasePolicy

START = (0.3, -0.7)
DTYPE = torch.float64


class ToyBank:
    """Vectors of two numbers under the names of adapters, switched like adapters."""

    def __init__(self, vectors: nn.ParameterDict) -> None:
        self._vectors = vectors
        self._settings: dict[str, int] = {"default": 2}
        self.version = 0
        self.active: str | None = "default"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._vectors)

    def settings(self, name: str) -> Any:
        raise KeyError(name)

    def add(self, name: str, value: Sequence[float] = START, trainable: bool = True) -> None:
        vector = torch.tensor(value, dtype=DTYPE)
        self._vectors[name] = nn.Parameter(vector, requires_grad=trainable)
        self.version += 1

    def copy(self, source: str, target: str) -> None:
        with torch.no_grad():
            self._vectors[target].copy_(self._vectors[source])

    def vector(self) -> Tensor:
        return torch.zeros(2, dtype=DTYPE) if self.active is None else self._vectors[self.active]

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        before, self.active = self.active, name
        try:
            yield
        finally:
            self.active = before

    def disabled(self) -> Any:
        return self.using(None)

    def assert_ready_for_backward(self) -> None:
        if self.active is None:
            raise RuntimeError("backward while the adapters are switched off")


class ToyPolicy(BasePolicy):
    """``value(x) = x . theta`` with theta the active vector; the bare network has theta = 0."""

    lora_targets = ()

    def __init__(self) -> None:
        super().__init__(nn.Module())
        self.module.vectors = nn.ParameterDict()
        self.adapters = ToyBank(self.module.vectors)  # type: ignore[assignment]
        self.adapters.add("default")  # type: ignore[call-arg]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def value(self, features: Tensor) -> Tensor:
        """Map features (..., 2) to (...)."""
        return features @ self.adapters.vector()

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        torch.save(dict(self.module.vectors), folder / "toy.pt")


@dataclass(frozen=True)
class ToySource:
    """Two global batches an epoch over ``count`` examples, shared out as the real loader does."""

    count: int = 5
    global_batch: int = 4
    micro: int = 2
    rank: int = 0
    world_size: int = 1
    left_out: Callable[[], Mapping[str, int]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "position", [0])

    @property
    def completed_epochs(self) -> int:
        return self.position[0] // self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.count // self.global_batch)

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            start = self.position[0] % self.steps_per_epoch * self.global_batch
            self.position[0] += 1
            mine = list(range(start, min(start + self.global_batch, self.count)))[self.rank :: self.world_size]
            yield [toy_batch(mine[i : i + self.micro]) for i in range(0, len(mine), self.micro)]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position[0]}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.position[0] = state["position"]


def toy_batch(indices: Sequence[int]) -> Batch:
    """The micro-batch of some examples."""
    seeds = torch.tensor([derive_seed(0, index) for index in indices])
    labels = torch.tensor([float(index % 2 == 0) for index in indices], dtype=DTYPE)
    return Batch([f"example-{index}" for index in indices], seeds, fields={"label": labels})


def features(batch: Batch, *shape: int, stream: str = "features") -> Tensor:
    """Features (B, *shape, 2), a function of each example's seed alone."""
    return randn_rows(batch.seeds, (*shape, 2), stream, torch.device("cpu"), DTYPE)

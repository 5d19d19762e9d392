"""The order of examples: a pure function of (seed, epoch), split over processes by index, resumable anywhere.

A *global batch* holds the examples of one optimizer step over all processes. Which examples those are depends on the
seed, the epoch and the global batch size alone: the number of processes and the micro-batch size only decide who
handles which of them. Every example is seen exactly once an epoch; the last global batch of an epoch (of each group,
where examples differ in shape) may be smaller and is never padded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from diffalign.data.prefetch import prefetched
from diffalign.diffusion.random import derive_seed
from diffalign.errors import UserError


class HasId(Protocol):
    """Anything with a stable name can be loaded; ``group`` is optional (see :func:`group_of`)."""

    @property
    def id(self) -> str: ...


E = TypeVar("E", bound=HasId)
T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch(Generic[E]):
    """Examples of one forward pass on one device, not encoded yet.

    Args:
        examples: the examples.
        seeds: (B,) int64, one for this visit of each example; all randomness of the visit derives from it.
        cache_keys: names of the visits where draws are pinned, else None; become ``Batch.cache_keys``.
        prepared: what the loader's ``prepare`` function made of it in the background.
    """

    examples: tuple[E, ...]
    seeds: Tensor
    cache_keys: tuple[str, ...] | None = None
    prepared: Any = None

    def select(self, rows: Sequence[int]) -> MicroBatch[E]:
        """Return some of the examples, not prepared."""
        keys = None if self.cache_keys is None else tuple(self.cache_keys[row] for row in rows)
        return MicroBatch(tuple(self.examples[row] for row in rows), self.seeds[list(rows)], keys)


@dataclass(frozen=True)
class LoaderOptions:
    """How examples are grouped and ordered.

    Args:
        seed: the run's seed.
        micro_batch: examples in one forward pass.
        accumulation: micro-batches of one process in one optimizer step.
        rank: this process.
        world_size: number of processes.
        pinned_draws: visits with seeds of their own; after so many epochs the same seeds come again. 0: always new.
        shuffle: False keeps the order of the data.
        shuffle_buffer: for streams: examples among which the next one is drawn.
        prefetch: micro-batches prepared ahead in a background thread; 0 switches the thread off.
        lockstep: micro-batches that processes run at the same time have the same size: of one example where a global
            batch does not divide.
    """

    seed: int = 0
    micro_batch: int = 1
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    pinned_draws: int = 0
    shuffle: bool = True
    shuffle_buffer: int = 1024
    prefetch: int = 0
    lockstep: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size} processes")
        if min(self.micro_batch, self.accumulation) < 1:
            raise UserError(f"a step needs examples: micro batch {self.micro_batch} x accumulation {self.accumulation}")

    @property
    def global_batch(self) -> int:
        """Examples in one optimizer step over all processes."""
        return self.micro_batch * self.accumulation * self.world_size


@dataclass(frozen=True)
class Position:
    """Where the loader stands: the next global batch to hand out."""

    epoch: int = 0
    batch: int = 0


class ExampleLoader(Generic[E]):
    """Hands out, endlessly, the micro-batches that this process contributes to each optimizer step.

    Args:
        data: a sequence of examples, or an object with ``open() -> Iterator`` (a stream).
        options: grouping and order.
        prepare: run on each micro-batch before it is handed out, in the background when ``prefetch`` is set; returns
            it with what it has made in ``MicroBatch.prepared``, and without examples that cannot be used.

    A step's list is empty where the last global batch has fewer examples than there are processes, or none can be
    used: such a process still takes part in the step's reductions.

    A stream cannot be permuted: its order is that of the source, mixed within ``shuffle_buffer`` examples by
    (seed, epoch). Every process reads the whole stream and keeps its share, so global batches are still independent of
    the number of processes; resuming reads again up to the saved position.

    Example::

        loader = ExampleLoader(dataset.examples, LoaderOptions(seed=0, micro_batch=4, accumulation=2))
        for micro_batches in loader:  # one optimizer step
            batches = [encoder(micro) for micro in micro_batches]
    """

    def __init__(
        self,
        data: Any,
        options: LoaderOptions,
        prepare: Callable[[MicroBatch[E]], MicroBatch[E]] | None = None,
    ) -> None:
        self.options = options
        self.position = Position()
        self._data = data
        self._streams = hasattr(data, "open")
        self._prepare = prepare
        if not self._streams:
            if not len(data):
                raise UserError("the data set is empty: there is nothing to train on")
            _require_unique([example.id for example in data])
            self._groups = _grouped(data)

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in one pass over the data; None for a stream."""
        if self._streams:
            return None
        return sum(math.ceil(len(rows) / self.options.global_batch) for rows in self._groups.values())

    @property
    def completed_epochs(self) -> int:
        """Passes over the data that have been handed out to the end; for a stream, those that another one follows."""
        per_epoch = self.steps_per_epoch
        return self.position.epoch + (per_epoch is not None and self.position.batch >= per_epoch)

    def __iter__(self) -> Iterator[list[MicroBatch[E]]]:
        """Yield the micro-batches of one optimizer step after another, from :attr:`position` on.

        The position moves on as a step is handed out: save it after the step is done.
        """
        return self.steps(lambda micro: micro)

    def steps(self, use: Callable[[MicroBatch[E]], T]) -> Iterator[list[T]]:
        """Yield what ``use`` makes of the micro-batches of one optimizer step after another.

        It is called as soon as a micro-batch is prepared, so that of the images of a large step only those of a few
        micro-batches are in memory at a time.
        """
        made: list[T] = []
        for item in prefetched(self._produce(self.position), self.options.prefetch):
            if isinstance(item, MicroBatch):
                made.append(use(item))
                continue
            self.position = item
            yield made
            made = []

    def first_examples(self, batches: int) -> list[E]:
        """Return the examples of a run's first optimizer steps, in the order of the data.

        Args:
            batches: how many steps; all examples from an epoch on.
        """
        per_epoch = self.steps_per_epoch
        if per_epoch is None:
            raise ValueError("a stream is not looked into before it is read")
        if batches >= per_epoch:
            return list(self._data)
        visited = {example.id for batch in itertools.islice(self.global_batches(0), batches) for example in batch}
        return [example for example in self._data if example.id in visited]

    def state_dict(self) -> dict[str, int]:
        """Return the position and what it depends on, as plain numbers."""
        return {
            "epoch": self.position.epoch,
            "batch": self.position.batch,
            "seed": self.options.seed,
            "global_batch": self.options.global_batch,
            "examples": 0 if self._streams else len(self._data),
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to a saved position; the number of processes may have changed, the global batch may not.

        Raises:
            UserError: if seed, global batch or data set are not those of the saved position.
        """
        current = self.state_dict()
        for name, what in (("seed", "--seed"), ("global_batch", "global batch"), ("examples", "number of examples")):
            if state[name] != current[name]:
                raise UserError(
                    f"cannot resume: the checkpoint was made with {what} {state[name]}, this run has {current[name]}; "
                    "the order of the data would differ"
                )
        self.position = Position(state["epoch"], state["batch"])

    def global_batches(self, epoch: int) -> Iterator[list[E]]:
        """Yield the examples of each optimizer step of an epoch, over all processes."""
        size = self.options.global_batch
        if self._streams:
            yield from _stream_batches(self._mixed_stream(epoch), size)
            return
        generator = self._generator("order", epoch)
        batches: list[list[int]] = []
        for rows in self._groups.values():
            order = (
                torch.randperm(len(rows), generator=generator).tolist() if self.options.shuffle else range(len(rows))
            )
            mixed = [rows[i] for i in order]
            batches += [mixed[start : start + size] for start in range(0, len(mixed), size)]
        if len(self._groups) > 1 and self.options.shuffle:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        for batch in batches:
            yield [self._data[row] for row in batch]

    def _produce(self, start: Position) -> Iterator[MicroBatch[E] | Position]:
        """Yield the micro-batches of a step, then the position of the next one, endlessly."""
        epoch, skip = start.epoch, start.batch
        while True:
            seen = 0
            for index, examples in enumerate(self.global_batches(epoch)):
                seen += 1
                if index >= skip:
                    yield from self._share(examples, epoch)
                    yield Position(epoch, index + 1)
            if not seen:
                raise UserError("the data set is empty: the stream ended before its first example")
            epoch, skip = epoch + 1, 0

    def _share(self, examples: Sequence[E], epoch: int) -> Iterator[MicroBatch[E]]:
        options = self.options
        mine = examples[options.rank :: options.world_size]
        visit = epoch % options.pinned_draws if options.pinned_draws else epoch
        size = 1 if options.lockstep and len(examples) % options.world_size else options.micro_batch
        for start in range(0, len(mine), size):
            part = tuple(mine[start : start + size])
            seeds = torch.tensor([derive_seed(options.seed, visit, example.id) for example in part])
            keys = tuple(f"{example.id}#{visit}" for example in part) if options.pinned_draws else None
            micro = MicroBatch(part, seeds, keys)
            prepared = self._prepare(micro) if self._prepare else micro
            if prepared.examples:
                yield prepared

    def _mixed_stream(self, epoch: int) -> Iterator[E]:
        if not self.options.shuffle:
            yield from self._data.open()
            return
        generator = self._generator("stream", epoch)
        buffer: list[E] = []
        for example in self._data.open():
            if len(buffer) < self.options.shuffle_buffer:
                buffer.append(example)
                continue
            place = int(torch.randint(len(buffer), (1,), generator=generator))
            yield buffer[place]
            buffer[place] = example
        for place in torch.randperm(len(buffer), generator=generator).tolist():
            yield buffer[place]

    def _generator(self, stream: str, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.options.seed, stream, epoch))


def group_of(example: Any) -> Hashable:
    """Return the example's ``group`` if it has one: only examples of one group share a global batch."""
    return getattr(example, "group", None)


def _grouped(data: Sequence[Any]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for row, example in enumerate(data):
        groups.setdefault(group_of(example), []).append(row)
    return groups


def _stream_batches(examples: Iterator[E], size: int) -> Iterator[list[E]]:
    waiting: dict[Hashable, list[E]] = {}
    for example in examples:
        batch = waiting.setdefault(group_of(example), [])
        batch.append(example)
        if len(batch) == size:
            yield waiting.pop(group_of(example))
    yield from waiting.values()


def _require_unique(ids: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise UserError(f"two examples have the id {name!r}: seeds and caches need ids that differ")
        seen.add(name)

"""Looking at a model besides training it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from diffalign.strategies.base import Context
from diffalign.training.processes import Processes
from diffalign.training.runfolder import RunFolder
from diffalign.training.trackers import Tracker


class Observer(Protocol):
    """Looks at the model besides training: validation grids, scores before and after.

    Every process has one, or none has. All call a hook together, with the moving average in place of the weights
    where there is one and in the run's mixed precision; only the main one's has trackers, and what it returns counts:
    of the first two what early stopping watches, if anything. What a hook does on one process alone it does in a way
    that ends all of them (:meth:`RunFolder.on_main`).
    """

    def before(self, folder: RunFolder) -> float | None: ...

    def during(self, step: int, folder: RunFolder, trackers: Sequence[Tracker]) -> float | None: ...

    def after(self, step: int, folder: RunFolder, trackers: Sequence[Tracker]) -> dict[str, Any]: ...


class OnMain:
    """Lets an observer look on the main process, while the others wait; an :class:`Observer` itself.

    Args:
        observer: looks.
        processes: all of them.
    """

    def __init__(self, observer: Observer, processes: Processes) -> None:
        self._observer, self._processes = observer, processes

    def before(self, folder: RunFolder) -> float | None:
        return folder.on_main(self._processes, lambda: self._observer.before(folder))

    def during(self, step: int, folder: RunFolder, trackers: Sequence[Tracker]) -> float | None:
        return folder.on_main(self._processes, lambda: self._observer.during(step, folder, trackers))

    def after(self, step: int, folder: RunFolder, trackers: Sequence[Tracker]) -> dict[str, Any]:
        return folder.on_main(self._processes, lambda: self._observer.after(step, folder, trackers)) or {}


@contextmanager
def looking(ctx: Context) -> Iterator[None]:
    """Hold the network in eval mode; its mode and the global generators come back, also after an exception."""
    module = ctx.policy.module
    training = module.training
    with torch.random.fork_rng(devices=[ctx.device] if ctx.device.type == "cuda" else []):
        module.eval()
        try:
            yield
        finally:
            module.train(training)

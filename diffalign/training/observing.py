"""Looking at a model besides training it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from diffalign.strategies.base import Context
from diffalign.training.runfolder import RunFolder
from diffalign.training.trackers import Tracker


class Observer(Protocol):
    """Looks at the model besides training: validation grids, scores before and after.

    It runs on the main process, with the moving average in the place of the weights where there is one. The first two
    return what early stopping watches, if anything.
    """

    def before(self, folder: RunFolder) -> float | None: ...

    def during(self, step: int, folder: RunFolder, trackers: Sequence[Tracker]) -> float | None: ...

    def after(self, step: int, folder: RunFolder, trackers: Sequence[Tracker]) -> dict[str, Any]: ...


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
